"""A trained guide from its folder, and what it does to a pipeline's sampling.

A guide knows sigma and what is diffused, not whose: it goes with every model of the same pixels, or of the same
autoencoder's latents, at a size that it was trained at, whatever noise that model was trained with.

The folder: ema.safetensors and raw.safetensors (the network), meta.json:

    guide        classifier | clip                 system, model    of which it was trained beside
    network      of HalfUNetConfig                 space            `Pipeline.space`: what is diffused
    diffusion    its own noise                     picture          sizes of the images
    classes      of a classifier, their names      heldout          accuracy by timestep, on records kept out
    text, scale  of a CLIP: `Pipeline.text_space`, and of its logits
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raphael.base.checkpoint.folder import Stored, checkpoint_sha256, load_weights, read_checkpoint
from raphael.base.config.guide import HalfUNetConfig
from raphael.base.config.preset import DiffusionConfig
from raphael.base.stage import StageError, of_a_stranger
from raphael.base.strict import load
from raphael.diffusion.guidance import GradientGuidance, LogP
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import variance_preserving_scale
from raphael.net.noised.half import HalfUNet
from raphael.objectives.noised import class_log_p, text_log_p

if TYPE_CHECKING:
    from raphael.diffusion.sampling import Parts, Wrap

KINDS = ("classifier", "clip")
HOME = Path("models/guides")  # of a workspace: each guide in a folder of its kind's name
EXPECTED = "classifier:PATH or clip:PATH"


class Guide:
    """`load_guide("classifier:models/guides/classifier")`; `of(pipeline, prompts)` says where sampling is to go."""

    def __init__(self, network: nn.Module, meta: dict[str, Any], where: str, identity: str):
        self.network = network.eval().requires_grad_(False)
        self.meta, self.where, self.identity = meta, where, identity
        self.kind: str = meta["guide"]
        self.noise = noise_of(load(DiffusionConfig, meta["diffusion"], f"{where}: meta.json", "diffusion"))

    @property
    def name(self) -> str:
        """By which images say what guided them."""
        return f"{self.kind}:{self.identity}"

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x = x_0 + sigma eps (B, C, h, w), sigma (B,) finite -> what the network says (B, D)."""
        scale = variance_preserving_scale(sigma).view(-1, 1, 1, 1)
        weight = self.network.conv_in.weight
        x_vp = (x * scale).to(weight.dtype)
        return self.network(x_vp, self.noise.timestep(sigma))

    def of(self, pipeline: Any, prompts: list[str]) -> LogP:
        """log p of each prompt's class or caption, one a row of the batch. Raises ValueError for a prompt that it
        cannot be asked for."""
        with torch.inference_mode(False), torch.no_grad():  # what was made in inference mode cannot enter a graph
            if self.kind == "classifier":
                classes = torch.tensor([self.class_of(prompt) for prompt in prompts], device=pipeline.device)
                return lambda x, sigma: class_log_p(self(x, sigma), classes)
            unique = sorted(set(prompts))
            texts = pipeline.embed_texts(unique)[[unique.index(prompt) for prompt in prompts]]
        return lambda x, sigma: text_log_p(self(x, sigma), texts, self.meta["scale"])

    def class_of(self, prompt: str) -> int:
        """The class that a prompt is, or the one whose name is a word of it. Raises ValueError."""
        classes = self.meta["classes"]
        if prompt in classes:
            return classes.index(prompt)
        words = rf"\b({'|'.join(re.escape(name) for name in sorted(classes, key=len, reverse=True))})\b"
        found = {match.lower() for match in re.findall(words, prompt, re.IGNORECASE)}
        named = [number for number, name in enumerate(classes) if name.lower() in found]
        if len(named) != 1:
            got = "none" if not named else " and ".join(classes[number] for number in named)
            raise ValueError(
                f"guidance: got the prompt {prompt!r}, which names {got} of {', '.join(classes)}; expected one"
            )
        return named[0]

    def expect_fit(self, pipeline: Any, latent_shape: tuple[int, ...]) -> None:
        """Raises ValueError for a model that diffuses something else, or at another size, and says what to do."""
        config, factor = self.network.config, pipeline.downsampling
        again = f"train one beside this model: raphael train --guide {self.kind} --from MODEL"
        mine = f"{self.where}: got a {self.kind} of the system {self.meta['system']}"
        if self.meta["space"] != pipeline.space or config.latent_channels != latent_shape[0]:
            got = f"{self.meta['space']} of {config.latent_channels} channels"
            want = f"{pipeline.space} of {latent_shape[0]}, which this model of the system {pipeline.system} diffuses"
            raise ValueError(f"guidance: {mine}, which reads {got}, expected {want}; {again}")
        sizes, size = self.meta["picture"]["sizes_px"], [factor * side for side in latent_shape[1:]]
        if size not in sizes:
            known = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(f"guidance: {mine} for images of {known} px, got {size[0]} x {size[1]}; {again}")
        if self.kind == "clip" and self.meta["text"] != pipeline.text_space:
            got = f"whose captions were read by another text encoder ({self.meta['text']})"
            raise ValueError(f"guidance: {mine}, {got}, expected {pipeline.text_space}; {again}")

    def to(self, device: torch.device | str) -> Guide:
        self.network.to(device)
        return self


def load_guide(spec: str | Guide, weights: str = "ema") -> Guide:
    """ "classifier:PATH" or "clip:PATH", a folder that `raphael train --guide` wrote; "classifier" alone is the
    workspace's. Raises StageError, one line: absent (and how to train one), another kind, damaged."""
    if isinstance(spec, Guide):
        return spec
    kind, colon, place = str(spec).partition(":")
    if kind not in KINDS or (colon and not place):
        hint = "" if isinstance(spec, str | Path) else "; a number is guidance_scale, or with a guide guidance_weight"
        raise StageError(f"guidance: got {spec!r}, expected {EXPECTED}{hint}")
    folder = Path(place) if place else HOME / kind
    if not (folder / "manifest.json").is_file():
        raise StageError(
            f"guidance: {folder}: no {kind} there; train one beside your model: raphael train --guide {kind} "
            f"--from MODEL --out {folder} (docs/guides/guidance.md)"
        )
    meta = Stored(folder).meta
    if (found := meta.get("guide")) != kind:
        got = f"a {found}" if found else "a checkpoint that is no guide"
        raise StageError(f"guidance: {folder}: got {got}, expected a {kind}")
    # weights made in inference mode could not enter a graph
    with of_a_stranger(folder), torch.inference_mode(False):
        groups, _ = read_checkpoint(folder, [weights])
        network = HalfUNet(load(HalfUNetConfig, meta["network"], str(folder / "meta.json"), "network"))
        load_weights(network, groups[weights], folder)
        return Guide(network, meta, str(folder), checkpoint_sha256(folder)[:16])


def guided(pipeline: Any, parts: Parts, spec: str | Guide | None, weight: float | None) -> Parts:
    """The parts, guided by gradients of weight `weight` (None: 1) where a guide is named; themselves where none is.

    A model that reads no prompts (an unconditional one) is told nothing of them then: the guide alone is. Raises
    ValueError for what does not fit, StageError for what is not there.
    """
    if spec is None:
        if weight is not None:
            raise ValueError(f"guidance_weight: got {weight:g} without guidance, expected {EXPECTED} with it")
        return parts
    weight = 1.0 if weight is None else weight
    if not 0 <= weight < float("inf"):
        raise ValueError(f"guidance_weight: got {weight:g}, expected 0 or more")
    guide = load_guide(spec).to(pipeline.device)
    guide.expect_fit(pipeline, parts.latent_shape)

    def wrap_of(prompts: list[str]) -> Wrap:
        log_p = guide.of(pipeline, prompts)
        return lambda denoiser: GradientGuidance(denoiser, log_p, weight)

    encode: Callable[[list[str]], Any] = parts.encode
    if not pipeline.reads_prompts:
        encode = lambda texts: parts.encode([""] * len(texts))  # noqa: E731
    return replace(parts, guide=wrap_of, encode=encode)


def told(spec: str | Guide | None, weight: float | None) -> dict[str, Any]:
    """What images say of their guide; {} without one."""
    if spec is None:
        return {}
    return {"guidance": load_guide(spec).name, "guidance_weight": 1.0 if weight is None else weight}
