"""The edits that are served: of each kind its body, what is read of it, and the function of raphael/edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.edit import rewrite
from raphael.edit.invert import ROUNDS, reconstruct
from raphael.edit.known import image_to_image, inpaint, outpaint
from raphael.edit.paint import ARRANGEMENTS, paint
from raphael.edit.run import Edited, How
from raphael.edit.sheets import style_sheet
from raphael.edit.switch import switch
from raphael.edit.vary import interpolate, variations
from raphael.edit.words import recolours
from raphael.serve import bodies as b
from raphael.serve.door.problems import Problem
from raphael.serve.images import b64, png, read_upload, upload_size, white

if TYPE_CHECKING:
    from raphael.generate.pipeline import Pipeline
    from raphael.serve.info import ModelInfo

BY_ATTENTION = ("replace", "refine", "reweight", "paint")  # of models of one network
Images = dict[str, np.ndarray]
Read = Callable[["ModelInfo", Any], Images]
Act = Callable[["Pipeline", Any, Images, How], Edited]


@dataclass(frozen=True)
class Kind:
    """act: what draws. read: the uploads of a body, decoded. words: whether it needs a model that reads words.

    passes: how many times it goes through the steps, so that progress can be told; more: evaluations of the network
    beside, of a sampler that takes `steps` steps of `each` evaluations.
    """

    body: type[b.SamplingBody]
    act: Act
    read: Read = field(default=lambda info, body: {})
    words: bool = False
    passes: Callable[[Any], int] = field(default=lambda body: 1)
    more: Callable[[Any, int, int], int] = field(default=lambda body, steps, each: 0)


def edits_of(pipeline: Pipeline) -> tuple[str, ...]:
    """The kinds that a model can."""
    reads_words = getattr(pipeline, "text_encoder", None) is not None
    cascade = len(pipeline.networks) > 1
    return tuple(
        name
        for name, kind in KINDS.items()
        if (reads_words or not kind.words) and not (cascade and name in BY_ATTENTION)
    )


def answer(kind: str, edited: Edited) -> dict[str, Any]:
    """What is told of an edit; images as PNGs in base64."""
    rows = zip(edited.source, edited.result, edited.without, strict=True)
    return {
        "kind": kind,
        "labels": list(edited.labels),
        "images": [dict(zip(("source", "result", "without"), map(_shown, row), strict=True)) for row in rows],
        "shown": {name: [_shown(image) for image in images] for name, images in edited.shown.items()},
        "facts": edited.facts,
        "rows": list(edited.rows),
    }


def _shown(image: np.ndarray) -> str:
    return b64(png(image))


def _picture(info: ModelInfo, body: b.PictureBody) -> Images:
    return {"image": read_upload(body.image, "image", info.size)}


def _picture_of_words(info: ModelInfo, body: b.RewriteBody) -> Images:
    return {} if body.image is None else {"image": read_upload(body.image, "image", info.size)}


def _picture_and_mask(info: ModelInfo, body: b.InpaintBody) -> Images:
    sizes = {name: upload_size(getattr(body, name), name) for name in ("image", "mask")}
    if sizes["mask"] != sizes["image"]:
        got, expected = ("{} x {} px".format(*sizes[name]) for name in ("mask", "image"))
        raise Problem(422, f"mask: got {got}, expected the image's {expected}", "mask")
    return _picture(info, body) | {"mask": white(read_upload(body.mask, "mask", info.size))}


def _picture_as_it_is(info: ModelInfo, body: b.OutpaintBody) -> Images:
    width, height = upload_size(body.image, "image")
    top, right, bottom, left = body.margins
    canvas = (width + left + right, height + top + bottom)
    if max(canvas) > info.max_px or any(side % info.multiple_px for side in canvas):
        got, expected = "{} x {} px".format(*canvas), f"multiples of {info.multiple_px} up to {info.max_px}"
        raise Problem(422, f"margins: got a canvas of {got} (width, height), expected {expected}", "margins")
    return {"image": read_upload(body.image, "image")}


def _regions(info: ModelInfo, body: b.PaintBody) -> Images:
    if len({region.phrase for region in body.regions}) < len(body.regions):
        raise Problem(422, "regions: got a phrase twice, expected each once", "regions")
    named = ((region, f"regions.{place}.mask") for place, region in enumerate(body.regions))
    return {region.phrase: white(read_upload(region.mask, name, info.size)) for region, name in named}


def _keep(body: b.KeepBody, kind: str) -> rewrite.Keep:
    return rewrite.kept(
        kind,
        body.prompt,
        getattr(body, "target", ""),
        cross=body.cross,
        self_attention=body.self_attention,
        self_map=body.self_map,
        by_word=body.cross_of,
        blend=None if body.blend is None else tuple(body.blend),
        threshold=body.blend_above,
    )


def _replace(pipeline: Pipeline, body: b.RewriteBody, images: Images, how: How) -> Edited:
    return rewrite.replace(pipeline, body.prompt, body.target, how, _keep(body, "replace"), images.get("image"))


def _refine(pipeline: Pipeline, body: b.RewriteBody, images: Images, how: How) -> Edited:
    return rewrite.refine(pipeline, body.prompt, body.target, how, _keep(body, "refine"), images.get("image"))


def _inpaint(pipeline: Pipeline, body: b.InpaintBody, images: Images, how: How) -> Edited:
    picture, mask = images["image"], images["mask"]
    return inpaint(pipeline, picture, mask, body.prompt, how, body.feather, body.strength)


def _outpaint(pipeline: Pipeline, body: b.OutpaintBody, images: Images, how: How) -> Edited:
    top, right, bottom, left = body.margins
    return outpaint(pipeline, images["image"], body.prompt, (top, right, bottom, left), how)


def _passes_of_rewriting(body: b.KeepBody) -> int:
    return (2 if body.blend else 1) + (ROUNDS if getattr(body, "image", None) is not None else 0)


def _passes_of_replacing(body: b.RewriteBody) -> int:
    return _passes_of_rewriting(body) + (body.blend is None and recolours(body.prompt, body.target))


def _arranging(body: b.PaintBody, steps: int, each: int) -> int:
    if not body.weight:
        return 0
    return ARRANGEMENTS * min(steps * each - (each - 1), body.arrange * each)  # the last step of heun is one


KINDS: Mapping[str, Kind] = {
    "switch": Kind(b.SwitchBody, lambda pipe, a, images, how: switch(pipe, a.prompt, a.then, a.share, how)),
    "image": Kind(
        b.ImageBody,
        lambda pipe, a, images, how: image_to_image(pipe, images["image"], a.prompt, a.strength, how),
        _picture,
        passes=lambda body: 2,
    ),
    "inpaint": Kind(
        b.InpaintBody,
        _inpaint,
        _picture_and_mask,
        passes=lambda body: 2,
    ),
    "outpaint": Kind(b.OutpaintBody, _outpaint, _picture_as_it_is, passes=lambda body: 2),
    "replace": Kind(b.RewriteBody, _replace, _picture_of_words, True, _passes_of_replacing),
    "refine": Kind(b.RewriteBody, _refine, _picture_of_words, True, _passes_of_rewriting),
    "reweight": Kind(
        b.ReweightBody,
        lambda pipe, a, images, how: rewrite.reweight(pipe, a.prompt, a.words, how, _keep(a, "reweight")),
        words=True,
        passes=_passes_of_rewriting,
    ),
    "paint": Kind(
        b.PaintBody,
        lambda pipe, a, images, how: paint(pipe, a.prompt, images, a.weight, how, a.away, a.arrange),
        _regions,
        words=True,
        more=_arranging,
    ),
    "vary": Kind(b.VaryBody, lambda pipe, a, images, how: variations(pipe, a.prompt, a.strength, how)),
    "interpolate": Kind(
        b.InterpolateBody, lambda pipe, a, images, how: interpolate(pipe, a.prompt, a.to, a.to_seed, how)
    ),
    "reconstruct": Kind(
        b.ReconstructBody,
        lambda pipe, a, images, how: reconstruct(pipe, images["image"], a.prompt, how),
        _picture,
        passes=lambda body: ROUNDS + 2,
    ),
    "styles": Kind(
        b.StylesBody,
        lambda pipe, a, images, how: style_sheet(pipe, a.prompt, a.styles, how),
        words=True,
        passes=lambda body: len(body.styles),
    ),
}
