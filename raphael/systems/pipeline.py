"""A trained model from its folder, called with diffusers' argument names: what the pipelines of all systems share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raphael.base.checkpoint.folder import Stored
from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.base.config.systems import DEFAULT, expect_system, find_system, system_of
from raphael.base.integrity.contents import check_contents, model_sha256
from raphael.base.stage import of_a_stranger
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import prediction_of
from raphael.diffusion.samplers import Callback
from raphael.diffusion.sampling import ImageSeed, Parts, decode_images, sample_order
from raphael.diffusion.scheduler import OwnScheduler, expect_fit, scheduler_config
from raphael.net.condition import Condition
from raphael.systems import module_of
from raphael.systems.exchange.opening import Opened, open_pretrained, save_pretrained
from raphael.systems.guides.guide import Guide, guided
from raphael.systems.halves import cast, expect_type, is_halved
from raphael.systems.lora.adapters import Adaptable
from raphael.systems.output import PipelineOutput, as_type
from raphael.systems.request import (
    OUTPUT_TYPES,
    Embedded,
    Generators,
    Images,
    Job,
    Origin,
    Start,
    Texts,
    chosen_sampling,
    default_size,
    expect_sizes,
    read_images,
    read_seeds,
    read_words,
    refuse_unknown,
    size_of,
)
from raphael.systems.watching import StepEnd, watching

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from raphael.summary.inside import Inside
    from raphael.summary.insight import Insight

WEIGHTS = "ema"  # the EMA weights are the model; "raw" is what the optimizer last held


class _Setting:
    """An option of `defaults`, read and set by its own name, as `pipeline.sampler = "heun"`."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: Pipeline, owner: type) -> Any:
        return getattr(pipeline.defaults, self.name)

    def __set__(self, pipeline: Pipeline, value: Any) -> None:
        pipeline.defaults = replace(pipeline.defaults, **{self.name: value})


class Pipeline(Adaptable):
    """Generate with `pipeline("a red circle", num_inference_steps=30).images[0]`.

    defaults: how to sample, for whatever a call leaves out; first as the model's own folder says. sampler, threshold*
    and precision of it are attributes, too, as a diffusers pipeline's scheduler is: how to sample, not what.
    precision: of the network's products, "fp32", "bf16" or "auto" (bf16 where it is native); None, the default, leaves
    an autocast that the caller has entered as it is.
    """

    sampler, precision, long_prompts = _Setting(), _Setting(), _Setting()
    threshold, threshold_percentile, threshold_bound = _Setting(), _Setting(), _Setting()

    system = DEFAULT
    unet: Any  # the network; what else is trained or frozen stands in `modules`

    def __init__(self, unet: Any, diffusion: DiffusionConfig, meta: dict[str, Any]):
        self.unet = unet.eval()
        self.diffusion = diffusion
        self.schedule = noise_of(diffusion)
        self.prediction = prediction_of(diffusion)
        self.meta = meta
        self.identity = ""
        self.source: Opened | None = None
        self.defaults = chosen_sampling(meta)
        self.batch_size = 50
        self._scheduler: Any = None
        self._interrupt = False  # set true by a callback_on_step_end, as in diffusers

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        weights: str = WEIGHTS,
        device: torch.device | str = "cpu",
        torch_dtype: torch.dtype = torch.float32,
    ) -> Pipeline:
        """Read a pipeline folder (models/raphael), a model that comes with this package by its name ("scenes"), what
        `raphael export` wrote, or any of these from the hub ("owner/name", into the hub's own cache).

        Of a checkpoint of another system (raphael/systems) the pipeline is that system's.
        device: where it generates; a torch.device, or a name of torch's such as "cuda".
        torch_dtype: of the network's matrices in memory, float32 or bfloat16, whatever type is stored; gates, norms and
        encoders stay float32. With bfloat16 its products are bfloat16's, too. Raises StageError: absent, broken, or of
        another shape; ValueError for another type.
        """
        expect_type(torch_dtype)
        with of_a_stranger(pretrained_model_name_or_path):
            opened = open_pretrained(pretrained_model_name_or_path)
            folder = opened.folder
            meta = Stored(folder).meta
            expect_sizes(meta.get("picture"), f"{folder}: meta.json")
            kind = module_of(system_of(meta), "pipeline", f"{folder}: meta.json: system").PIPELINE
            if not issubclass(kind, cls):
                expect_system(meta, folder, cls.system)
            check_contents(folder, list(find_system(system_of(meta)).carries))
            pipeline = kind.load(folder, weights)
            pipeline.identity, pipeline.source = model_sha256(folder)[:16], opened
        if torch_dtype == torch.bfloat16:
            cast(pipeline, torch_dtype)
        return pipeline.to(device)

    @classmethod
    def load(cls, folder: Path, weights: str) -> Pipeline:
        """A system's own: read its folder, on the CPU, in float32. Raises StageError."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True) -> None:
        """Write a folder that `from_pretrained` reads: the weights as they are now, `defaults` as how to sample. Raises
        StageError for a folder that holds something else, ValueError for pickles and for adapters that are not fused.
        """
        self.expect_saveable()
        if not safe_serialization:
            raise ValueError("safe_serialization: got false, expected true: a pickle can run code when it is read")
        save_pretrained(self, save_directory)

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """What was trained, by the folder that it lies in; "" the model's own."""
        return {"": self.unet}

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """What `to` moves."""
        return (self.unet,)

    @property
    def components(self) -> dict[str, Any]:
        """The parts by their names, as in diffusers."""
        return {"unet": self.unet, "scheduler": self.scheduler}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's matrices: gates, norms and encoders are float32 in any case."""
        return next(item.dtype for name, item in self.unet.named_parameters() if is_halved(name, item))

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | str | None = None
    ) -> Pipeline:
        """To a device, a type (`from_pretrained` says which), or both, in either order. Raises ValueError."""
        if isinstance(device, torch.dtype):
            device, dtype = dtype, device  # type: ignore[assignment]
        if dtype is not None:
            cast(self, dtype)
        for module in self.modules if device is not None else ():
            module.to(device)
        return self

    # diffusers' names are the contract here, so this is the one place with more than eight arguments
    @torch.inference_mode()
    def __call__(
        self,
        prompt: Texts | None = None,
        negative_prompt: Texts | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        *,
        sampling: Sampling | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        eta: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: str | Guide | None = None,
        guidance_weight: float | None = None,
        image: Images | None = None,
        strength: float = 0.8,
        seed: int | Sequence[int] = 0,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | Condition | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | Condition | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        collect: bool = False,
        progress: Callable[[int], None] | None = None,
        callback: Callback | None = None,
        **unknown: Any,
    ) -> PipelineOutput | tuple:
        """Generate num_images_per_prompt images for every prompt; those of one prompt lie side by side in `.images`.

        docs/guides/generate.md tells of every argument. Image i depends on (seed, i), of a list of seeds on the i-th as
        if it stood alone, and on its prompt. Raises ValueError for what does not fit, TypeError for an argument that
        there is not.
        """
        refuse_unknown(unknown, type(self).__call__)
        given = Embedded(prompt_embeds, prompt_attention_mask)
        given_null = Embedded(negative_prompt_embeds, negative_prompt_attention_mask)
        words = read_words(prompt, negative_prompt, num_images_per_prompt, given, given_null, self.unet)
        pictures = read_images(image, strength, len(words.prompts) // num_images_per_prompt)
        named = {"steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
        named |= {"guidance_interval": guidance_interval, "guidance_rescale": guidance_rescale}
        how, options = self._how(sampling, {name: value for name, value in named.items() if value is not None})
        parts = self.parts(*size_of(height, width, pictures), self.reader(how))
        parts = guided(self, parts, guidance, guidance_weight)
        watch = watching(self, callback_on_step_end, callback_on_step_end_tensor_inputs, callback)
        origin = self._origin(pictures, parts, strength, num_images_per_prompt)
        start = Start(read_seeds(seed), generator, latents)
        job = Job(parts, words, start, how, options, (timesteps, sigmas), watch, origin)
        result = self.generate(job, output_type, collect, progress)
        return result if return_dict else (result.images,)

    def generate(
        self, job: Job, output_type: str = "pil", collect: bool = False, progress: Callable[[int], None] | None = None
    ) -> PipelineOutput:
        """What a call does once it is read. progress: called with the number of images just finished."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: got {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}")
        if collect and not self.can_look_inside:
            raise ValueError(
                f"collect: got true, expected false: the system {self.system} has no maps or routes to show"
            )
        if collect and job.settings.long_prompts != "cut":
            raise ValueError(
                "collect: got true with long_prompts chunks, expected cut: maps are of one context's words"
            )
        if collect and job.words.given is not None:
            raise ValueError("collect: got true with prompt_embeds, expected prompts: maps are told by their words")
        count, latents, decoded = len(job.words.prompts), [], []
        job.check()
        for start in range(0, count, self.batch_size):
            part = range(start, min(start + self.batch_size, count))
            latents.append(sample_order(job.parts, job.order(part, self._scheduler)))
            if output_type != "latent":
                decoded.append(decode_images(job.parts, latents[-1]))
            if progress:
                progress(len(part))
        seeds = job.start.seeds(count)
        insight = self.look_inside(job.parts, job.words.prompts, torch.cat(latents), seeds) if collect else None
        return PipelineOutput(as_type(output_type, torch.cat(latents), decoded), insight=insight)

    def _how(self, sampling: Sampling | None, changes: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
        """How to sample, and what a diffusers scheduler's `step` is told: eta is of theirs then, not of ours."""
        options = {"eta": changes.pop("eta")} if self._scheduler is not None and "eta" in changes else {}
        return replace(sampling or self.defaults, **changes), options

    @property
    def scheduler(self) -> Any:
        """A diffusers scheduler that was set, or an OwnScheduler: its `config` makes one of them for this model."""
        return OwnScheduler(scheduler_config(self.diffusion)) if self._scheduler is None else self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        """A scheduler of diffusers takes the place of our samplers; an OwnScheduler gives it back to them.

        Raises ValueError for one that knows other noise than the model was trained with.
        """
        if not isinstance(scheduler, OwnScheduler):
            expect_fit(scheduler, self.schedule)
        self._scheduler = None if isinstance(scheduler, OwnScheduler) else scheduler

    def _origin(self, pictures: list[np.ndarray], parts: Parts, strength: float, each: int) -> Origin | None:
        """Of image to image: one for all, or one for each image."""
        if not pictures:
            return None
        x0 = torch.cat([self.latents_of(picture, parts) for picture in pictures])
        return Origin(x0 if len(x0) == 1 else x0.repeat_interleave(each, dim=0), strength)

    def latents_of(self, image: np.ndarray, parts: Parts) -> torch.Tensor:
        """uint8 (H, W, 3) -> the mean latents (1, C, h, w). Raises ValueError for an image of another size."""
        height, width = (side * self.downsampling for side in parts.latent_shape[1:])
        if image.dtype != np.uint8 or image.shape != (height, width, 3):
            got = f"{image.dtype} {tuple(image.shape)}"
            raise ValueError(f"image: got {got}, expected uint8 ({height}, {width}, 3)")
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.device).float() / 127.5 - 1
        with torch.inference_mode():
            return self.encode_images(pixels)

    def parts(
        self,
        height: int | None = None,
        width: int | None = None,
        encode: Callable[[list[str]], Condition] | None = None,
    ) -> Parts:
        """What sampling needs, for images of that size in pixels. encode: of texts, None: `self.encode`.

        Raises ValueError for a size that does not fit.
        """
        first_height, first_width = default_size(self.meta["picture"])
        height, width, multiple = height or first_height, width or first_width, self.multiple_px
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise ValueError(f"got an image of {height} x {width} px, expected multiples of {multiple} (height, width)")
        shape = (self.unet.config.latent_channels, height // self.downsampling, width // self.downsampling)
        return Parts(self.unet, self.schedule, self.prediction, encode or self.encode, self.decode, shape)

    downsampling = 1  # px to a side of what is diffused
    latent_scale = (1.0, 0.0)  # (factor, shift): what is diffused is (mean - shift) * factor of what records hold
    space = "pixels"  # what is diffused, by a name that differs where it does
    text_space = "no texts"  # the same of the vectors of `embed_texts`
    reads_prompts = True  # false: of an unconditional model; only a guide reads them (raphael/systems/guides)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """(n, D): each text as one vector of a CLIP's space. Raises ValueError where the system has no such encoder."""
        raise ValueError(f"clip: the system {self.system} has no text encoder of its own, expected a classifier")

    @property
    def multiple_px(self) -> int:
        """Of which an image's sides must be multiples: here a U-Net's halvings."""
        return self.downsampling * self.unet.config.multiple

    def encode(self, texts: list[str]) -> Condition:
        """What the network reads of the texts as they are written. Raises ValueError for one that it cannot read."""
        raise NotImplementedError

    def reader(self, how: Sampling, weighted: bool = True) -> Callable[[list[str]], Condition]:
        """Of prompts, by `how.long_prompts`. weighted: brackets weight words, as in a call; else they are letters.

        Raises ValueError where the system does not read them so.
        """
        if how.long_prompts != "cut":
            raise ValueError(f"long_prompts: got {how.long_prompts}, expected cut: so reads the system {self.system}")
        return self.encode

    def scorer(self) -> Any:
        """The ClipScorer of `best_of` where none is given. Raises ValueError where the system has none."""
        raise ValueError(f"best_of: the system {self.system} has no CLIP of its own, expected one: clip=, or --clip")

    def best_of(self, n: int, prompt: Texts, clip: Any = None, **call: Any) -> PipelineOutput:
        """Of n images of each prompt, or n for each of num_images_per_prompt, those that CLIP finds nearest to it.

        clip: a ClipScorer, or what `load_clip` takes. call: as of the pipeline's own call, with output_type "pil".
        """
        from raphael.systems.best_of import best_of

        return best_of(self, n, prompt, clip, call)

    def inspect(
        self, prompt: str, seed: int = 0, sampling: Sampling | None = None, negative_prompt: str = ""
    ) -> Inside:
        """Draw the image of (seed, 0), and what the network did at every step as named arrays (summary/inside.py).

        Raises ValueError for a system that has no maps or routes, and a prompt longer than the context.
        """
        raise ValueError(f"inspect: the system {self.system} has no maps or routes to show")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """What is diffused -> images (B, 3, H, W) in [-1, 1]; of a model of pixels they are it."""
        return latents

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> what is diffused, the mean of it: `decode`'s way back."""
        return images

    def painting(self) -> Pipeline:
        """Itself as it inpaints: with the network that sees mask and picture, where a system has one apart."""
        return self

    def asked_for(self, captions: list[str]) -> list[str]:
        """What a prompt would be for images with these captions: of a model by texts the captions themselves."""
        return captions

    def look_inside(self, parts: Parts, prompts: list[str], latents: torch.Tensor, seeds: list[ImageSeed]) -> Insight:
        """Of the generated latents; a system that has nothing to show leaves it as it is."""
        raise NotImplementedError

    @property
    def can_look_inside(self) -> bool:
        """Whether the system has maps or routes to show."""
        return type(self).look_inside is not Pipeline.look_inside
