"""What is known of a model without the model itself: all that a request is checked by before it is queued."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

from raphael.base.config.sampling import OF_CASCADES, OF_SAMPLERS, SamplerName, Sampling
from raphael.serve.bodies import SAMPLING_FIELDS, SamplingBody
from raphael.serve.door.problems import Problem, of_value_error


def told_sampling(how: Sampling, cascade: bool) -> dict[str, Any]:
    """How was sampled, by the names of a body: sent again, it gives the same. Options of cascades are told of those."""
    told = {name: own for name, own in SAMPLING_FIELDS.items() if cascade or own not in OF_CASCADES}
    return {name: _listed(getattr(how, own)) for name, own in told.items()}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ModelInfo:
    """What is told of a model, and all that a request can be checked by without it. size: (height, width) px."""

    id: str
    system: str
    identity: str
    size: tuple[int, int]
    multiple_px: int
    max_px: int
    defaults: Sampling
    edits: tuple[str, ...]
    inside: bool
    labels: tuple[str, ...] | None = None
    context_tokens: int | None = None
    examples: tuple[dict[str, Any], ...] = ()
    parameters: int = 0
    long_prompts: tuple[str, ...] = ("cut",)
    cascade: bool = False

    def told(self, default: str) -> dict[str, Any]:
        """An entry of /v1/models; object, owned_by: what OpenAI's clients look for."""
        return {
            "id": self.id,
            "object": "model",
            "owned_by": "raphael",
            "default": self.id == default,
            "samplers": list(get_args(SamplerName)),
            "defaults": told_sampling(self.defaults, self.cascade),
            **{name: getattr(self, name) for name in ("system", "identity", "multiple_px", "max_px", "inside")},
            **{name: getattr(self, name) for name in ("context_tokens", "parameters")},
            "size": list(self.size),
            "edits": list(self.edits),
            "long_prompts": list(self.long_prompts),
            "labels": None if self.labels is None else list(self.labels),
            "examples": list(self.examples),
        }

    def sampling(self, body: SamplingBody) -> Sampling:
        """What was asked for, over the model's own. Raises Problem for options that contradict each other."""
        asked = {own: getattr(body, name) for name, own in SAMPLING_FIELDS.items() if getattr(body, name) is not None}
        if interval := asked.get("guidance_interval"):
            asked["guidance_interval"] = tuple(interval)
        chosen = asked.get("sampler", self.defaults.sampler)
        for option, samplers in OF_SAMPLERS.items():  # the model's own of a sampler that is not the one asked for
            if option not in asked and chosen not in samplers:
                asked[option] = getattr(Sampling, option)
        try:
            how = replace(self.defaults, **asked)
            if not self.cascade:
                how.expect_one_network()
            return how
        except ValueError as error:
            raise of_value_error(error, type(body).model_fields) from None

    def check(self, body: SamplingBody) -> None:
        """Raises Problem that names the field which does not fit this model."""
        if self.sampling(body).long_prompts not in self.long_prompts:
            expected = " or ".join(self.long_prompts)
            detail = f"long_prompts: got {body.long_prompts}, expected {expected}: so reads this model"
            raise Problem(422, detail, "long_prompts", list(self.long_prompts))
        for name in ("width", "height"):
            side = getattr(body, name, None)
            if side is not None and (side % self.multiple_px or not self.multiple_px <= side <= self.max_px):
                expected = f"a multiple of {self.multiple_px} up to {self.max_px}"
                raise Problem(422, f"{name}: got {side} px, expected {expected}", name)
        if self.labels is not None and body.prompt not in ("", *self.labels):
            known = ", ".join(self.labels) or "nothing: this model is unconditional"
            raise Problem(422, f"prompt: this model knows {known}", "prompt", list(self.labels))


@dataclass(frozen=True)
class Catalogue:
    """The models of a server by id; the first is the default."""

    infos: tuple[ModelInfo, ...]
    by_id: dict[str, ModelInfo] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_id", {info.id: info for info in self.infos})

    @property
    def default(self) -> str:
        return self.infos[0].id

    def find(self, name: str | None) -> ModelInfo:
        """Raises Problem for an id that is none of a model here."""
        if name is None:
            return self.infos[0]
        if name not in self.by_id:
            raise Problem(404, "model: no such model here", "model", list(self.by_id))
        return self.by_id[name]
