"""What may be asked: every body, field by field, with its range. What is not here is refused by its name.

How to sample are the options of `Sampling` (raphael/base/config/sampling.py), by their own names and ranges: one that
is added there may be asked for here.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from raphael.base.config.sampling import Sampling
from raphael.base.strict import Range

MAX_STEPS = 100
MAX_IMAGES = 8
PROMPT_CHARS = 1000
LARGEST_SEED = 2**53 - 1  # whole numbers that every JSON reader keeps
MOST = {  # of options without an upper bound of their own
    "steps": MAX_STEPS,
    "upsampler_steps": MAX_STEPS,
    "guidance_scale": 50.0,
    "upsampler_guidance": 50.0,
    "threshold_bound": 50.0,
}
NAMES = {"steps": "num_inference_steps"}  # diffusers'; all others are ours
THE_SERVERS = ("precision",)  # how it computes is no wish of a client's
PART_PX = 4096  # a side of an uploaded image
IMAGE_CHARS = 12 << 20  # of one, as base64

Text = Annotated[str, Field(max_length=PROMPT_CHARS)]
Phrase = Annotated[str, Field(min_length=1, max_length=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Picture = Annotated[str, Field(max_length=IMAGE_CHARS, description="PNG, JPEG or WebP, as base64 or a data URI")]
Mask = Annotated[str, Field(max_length=IMAGE_CHARS, description="an image of the same size, white where it counts")]
OneContext = Literal["cut"]  # of what looks at single words: maps and hooks are of one context's
Side = Annotated[int, Field(ge=8, le=PART_PX)]


class Body(BaseModel):
    """Strict: no unknown field, no text where a number belongs, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def options() -> Iterator[tuple[str, str, Any, str]]:
    """(name in a body, name in Sampling, type with its range, what it says) of every option that may be asked for."""
    hints = typing.get_type_hints(Sampling, include_extras=True)
    for own in dataclasses.fields(Sampling):
        if own.name in THE_SERVERS:
            continue
        kind, ranges = hints[own.name], ()
        if typing.get_origin(kind) is Annotated:
            kind, *ranges = typing.get_args(kind)
        elif typing.get_origin(kind) is tuple:  # (low, high), as a list of two
            kind = Annotated[
                list[_bounded(*typing.get_args(typing.get_args(kind)[0]))], Field(min_length=2, max_length=2)
            ]
        bounds = [*ranges, *([Range(high=MOST[own.name])] if own.name in MOST else [])]
        yield NAMES.get(own.name, own.name), own.name, _bounded(kind, *bounds), own.metadata["help"]


def _bounded(kind: Any, *ranges: Range) -> Any:
    """The type within all of these, as pydantic says it; a number's bounds are then in /openapi.json, too."""
    if not ranges:
        return kind
    low, high = max(one.low for one in ranges), min(one.high for one in ranges)
    ends = {"ge": low, "le": high}
    return Annotated[kind, Field(**{name: kind(end) for name, end in ends.items() if abs(end) != float("inf")})]


SAMPLING_FIELDS = {name: own for name, own, _, _ in options()}  # of a body -> of Sampling
SamplingOptions = create_model(
    "SamplingOptions",
    __base__=Body,
    **{name: (Annotated[kind | None, Field(description=says)], None) for name, _, kind, says in options()},
)


class SamplingBody(SamplingOptions):
    """How to sample; what is left out is the model's own."""

    model: Annotated[str, Field(max_length=100, description="an id of /v1/models; left out: the default")] | None = None
    negative_prompt: Text = ""
    seed: Annotated[Seed, Field(description="left out: a random one, which the answer tells")] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="images, of (seed, 0), (seed, 1), ...")] = 1

    @field_validator("n", "negative_prompt", "long_prompts", mode="before")
    @classmethod
    def _null_is_left_out(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value


class ImagesBody(SamplingBody):
    """`POST /v1/images`."""

    prompt: Text
    width: Side | None = None
    height: Side | None = None


class InsideBody(SamplingBody):
    """`POST /v1/inside`: one image, of (seed, 0), and what the network did while it drew it."""

    prompt: Text
    long_prompts: OneContext = "cut"
    n: Literal[1] = 1


class SwitchBody(SamplingBody):
    prompt: Text
    then: Annotated[Text, Field(description="the prompt of the later steps")]
    share: Annotated[Share, Field(description="of the steps that see the first prompt")] = 0.3


class PictureBody(SamplingBody):
    image: Picture
    prompt: Text


class ImageBody(PictureBody):
    strength: Annotated[Share, Field(description="0: the picture; 1: the prompt")] = 0.6


class InpaintBody(PictureBody):
    mask: Mask
    feather: Annotated[int, Field(ge=0, le=64, description="px around the mask that are mixed")] = 4
    strength: Annotated[Share, Field(description="below 1 the hole begins as the ground around it")] = 1.0


Margin = Annotated[int, Field(ge=0, le=PART_PX)]


class OutpaintBody(PictureBody):
    margins: Annotated[list[Margin], Field(min_length=4, max_length=4, description="px: top, right, bottom, left")]


class KeepBody(SamplingBody):
    """How much of the source stays (raphael/edit/rewrite.py, Keep); None: as the kind has it by default (`kept`)."""

    prompt: Text
    long_prompts: OneContext = "cut"
    cross: Annotated[Share | None, Field(description="share of the steps with the source's maps")] = None
    cross_of: Annotated[dict[Phrase, Share], Field(max_length=32, description="another share for a word")] = {}
    self_attention: Share | None = None
    self_map: Share | None = None
    blend: Annotated[
        list[Phrase] | None,
        Field(max_length=16, description="stay the source outside of these words"),
    ] = None
    blend_above: Share | None = None


class RewriteBody(KeepBody):
    target: Annotated[Text, Field(description="the prompt after the edit")]
    image: (
        Annotated[Picture, Field(description="a picture that the prompt describes, in place of a drawn one")] | None
    ) = None


class ReweightBody(KeepBody):
    words: Annotated[
        dict[Phrase, Annotated[float, Field(ge=-10, le=10)]], Field(min_length=1, max_length=32, description="factors")
    ]


class Region(Body):
    phrase: Phrase
    mask: Mask


class PaintBody(SamplingBody):
    prompt: Text
    long_prompts: OneContext = "cut"
    regions: Annotated[list[Region], Field(min_length=1, max_length=8)]
    weight: Annotated[float, Field(ge=0, le=10, description="of the painting; 0: none")] = 0.5
    away: Annotated[float, Field(ge=0, le=10, description="how much less a phrase is seen outside its region")] = 1.0
    arrange: Annotated[int, Field(ge=0, le=10, description="steps by which the seed's noise is rearranged")] = 3


class VaryBody(SamplingBody):
    prompt: Text
    strength: Annotated[Share, Field(description="0: the seed's own image; 1: another's")] = 0.3


class InterpolateBody(SamplingBody):
    prompt: Text
    to: Text | None = None
    to_seed: Seed | None = None
    n: Annotated[int, Field(ge=2, le=MAX_IMAGES, description="images, ends included")] = 5


class ReconstructBody(PictureBody):
    pass


class StylesBody(SamplingBody):
    prompt: Text
    long_prompts: OneContext = "cut"
    styles: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(
            min_length=1, max_length=MAX_IMAGES, description="words behind the prompt, or a text with {prompt} in it"
        ),
    ]
    n: Literal[1] = 1


class OpenAiBody(Body):
    """`POST /v1/images/generations`, as OpenAI's clients send it; what has no meaning here is accepted all the same."""

    prompt: Text
    model: Annotated[str, Field(max_length=100)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$", description="WIDTHxHEIGHT, or auto")] | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    quality: Annotated[str, Field(max_length=20)] | None = None
    style: Annotated[str, Field(max_length=20)] | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    seed: Annotated[Seed, Field(description="ours; left out: a random one")] | None = None

    def images_body(self) -> ImagesBody:
        width, height = (None, None) if self.size in (None, "auto") else map(int, str(self.size).split("x"))
        asked = {"prompt": self.prompt, "model": self.model, "n": self.n or 1, "seed": self.seed}
        return ImagesBody(**asked, width=width, height=height)
