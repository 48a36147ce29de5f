"""How to sample: one dataclass for params.yaml's `generate`, the command line, a model's own folder and a call.

An option is a field here and the code that acts on it (raphael/diffusion): settings, `raphael generate`, meta.json,
images.json, sweeps and the report read the fields. One that comes later has `later`: at its default it is told nowhere,
so that what was made before it keeps its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from raphael.base.config.preset import Count, Positive, Share
from raphael.base.strict import LATER, Range, to_dict

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral"]
ThresholdKind = Literal["none", "static", "dynamic"]
LongPrompts = Literal["cut", "chunks"]
# options of models that have several networks
OF_CASCADES = ("until", "upsampler_steps", "upsampler_guidance", "augmentation", "upsampler_spacing")
OF_SAMPLERS: dict[str, tuple[SamplerName, ...]] = {"eta": ("ddim",), "variance": ("ddpm",)}  # options of those alone


def option(default: Any, text: str, later: bool = False) -> Any:
    """A field: its default and what `raphael generate --help` says of it."""
    return field(default=default, metadata={"help": text, **(LATER if later else {})})


@dataclass(frozen=True)
class Sampling:
    """Raises ValueError for options that contradict each other."""

    sampler: SamplerName = option("dpmpp_2m", "how the noise is taken away")
    steps: Count = option(30, "denoising steps; heun evaluates the network twice a step, the others once")
    guidance_scale: Annotated[float, Range(0)] = option(4.0, "1: none; 0 ignores the prompt")
    # None: as the caller's own autocast has it, which without one is fp32 (raphael/base/precision.py)
    precision: Literal["auto", "fp32", "bf16"] | None = option(
        None, "of the network's products; auto: bf16 where the processor has it"
    )
    eta: Share = option(0.0, "of ddim: 0 deterministic, 1 as ddpm")
    guidance_interval: tuple[Share, ...] = option(
        (0.0, 1.0), "guide only there: shares of the timesteps, 0 clean, 1 noise"
    )
    threshold: ThresholdKind = option("none", "of the estimates of x_0, for models of pixels, whose bounds are known")
    threshold_percentile: Annotated[float, Range(0, 100)] = option(99.5, "of |x_0|, dynamic only")
    threshold_bound: Positive = option(1.0, "of |x_0| in the data: 1 for pixels")
    variance: Literal["posterior", "beta"] = option("posterior", "of ddpm's noise: beta~ or beta", later=True)
    guidance_rescale: Share = option(0.0, "how far guidance gives contrast back, 0 to 1", later=True)
    long_prompts: LongPrompts = option(
        "cut", "those longer than the model reads: cut, with a warning, or read chunk by chunk", later=True
    )
    until: Literal["end", "base"] = option("end", "of a cascade: base shows its first network's images", later=True)
    upsampler_steps: Count = option(10, "denoising steps of a cascade's upsampler", later=True)
    upsampler_guidance: Annotated[float, Range(0)] = option(1.0, "guidance scale of it; 1: none", later=True)
    augmentation: Share = option(0.1, "noise on what it enlarges: 0 none, 1 nothing else", later=True)
    upsampler_spacing: Literal["trailing", "fast27"] = option(
        "trailing", "its noise levels: equal steps of time, or the 27 of GLIDE, most of them near the end", later=True
    )

    def __post_init__(self) -> None:
        for name, samplers in OF_SAMPLERS.items():
            got, default = getattr(self, name), getattr(type(self), name)
            if got != default and self.sampler not in samplers:
                raise ValueError(
                    f"{name}: got {_short(got)} with sampler {self.sampler}, expected {_short(default)}: only "
                    f"{', '.join(samplers)} has it"
                )
        # the default of the number of steps means that nobody asked for one
        if self.upsampler_spacing == "fast27" and self.upsampler_steps not in (27, type(self).upsampler_steps):
            raise ValueError(
                f"upsampler_steps: got {self.upsampler_steps} with upsampler_spacing fast27, expected 27; or set "
                "upsampler_spacing trailing"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"eta: got {self.eta:g}, expected a number from 0 (deterministic) to 1 (the noise of ddpm)"
            )
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            got = " to ".join(f"{end:g}" for end in interval)
            raise ValueError(f"guidance_interval: got {got}, expected two shares, the lower first")

    def of_one_network(self) -> Sampling:
        """The same without the options of cascades."""
        return replace(self, **{name: getattr(type(self), name) for name in OF_CASCADES})

    def of_upsampler(self) -> Sampling:
        """As a cascade's second network is sampled: by its own steps and guidance, at all noise levels."""
        own = {"steps": self.upsampler_steps, "guidance_scale": self.upsampler_guidance}
        return replace(self.of_one_network(), **own, guidance_interval=(0.0, 1.0), guidance_rescale=0.0)

    def expect_one_network(self) -> None:
        """Raises ValueError for an option of cascades that is not at its default."""
        for name in OF_CASCADES:
            if (got := getattr(self, name)) != (default := getattr(type(self), name)):
                raise ValueError(f"{name}: got {_short(got)}, expected {_short(default)}: the model has no upsampler")


def own_sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Of settings that tell more, what a model's folder says of how it wants to be sampled: all but the precision."""
    return {name: value for name, value in settings.items() if name in OWN}


def told(sampling: Sampling) -> dict[str, Any]:
    """What images.json says of how its images were sampled."""
    return own_sampling(to_dict(sampling))


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


OWN = tuple(item.name for item in fields(Sampling) if item.name != "precision")
