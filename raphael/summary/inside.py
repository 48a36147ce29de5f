"""What a model does while it draws one image, step by step, as arrays: `pipeline.inspect(prompt, seed)`.

The image is the pipeline's own to the bit: hooks that only look change nothing (raphael/net/attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.base.config.sampling import Sampling
from raphael.base.stage import write_json
from raphael.diffusion.image_noise import ImageNoise, ImageSeed
from raphael.diffusion.sampling import Order, Parts, decode_images, encode_texts, sample_order
from raphael.encoders.text import PAD
from raphael.net.condition import AttentionHooks, HookCall
from raphael.net.moe.mixtures import region_mask


@dataclass
class Inside:
    """Letters: S steps, L transformer blocks in the order of the forward pass, N real tokens, h x w the largest map.

    Blocks with smaller maps are enlarged to it, pixel by pixel, in `cross`, `masks` and `edges`; heads are averaged.
    All are of the conditional branch. What a model does not have is empty: its length along that axis is 0.
    """

    prompt: str
    words: list[str]  # (N,) the piece at each token, "<start>" and "<end>" included: what attends to those is idle
    sigmas: np.ndarray  # (S,) float64, the noise level of each step; infinite where a schedule ends in pure noise
    timesteps: np.ndarray  # (S,) float64
    cross: np.ndarray  # (S, L, h, w, N) float32: where each word is looked at; over all N it sums to 1
    self_attention: list[np.ndarray]  # L of (S, P_l, P_l) float32, queries first: maps of the block's own size
    edges: np.ndarray  # (S, L', h, w) float32: predicted edge probability of the L' blocks with edge heads
    masks: np.ndarray  # (S, L', h, w, N) bool: the region of each word in the L' blocks with a Space-MoE
    space_routes: np.ndarray  # (L', N) int64: the expert of each word
    time_routes: np.ndarray  # (L', S) int64: the expert of each step
    x0: np.ndarray  # (S, H, W, 3) uint8: the estimate of the image at each step, decoded
    image: np.ndarray  # (H, W, 3) uint8

    def arrays(self) -> dict[str, np.ndarray]:
        """All by name; self-attention of block l as self_attention_l."""
        named = {item.name: getattr(self, item.name) for item in fields(self)}
        found = {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
        return found | {f"self_attention_{index}": value for index, value in enumerate(self.self_attention)}

    def save(self, folder: Path) -> list[Path]:
        """inside.npz with `arrays`, inside.json with prompt, words, noise levels, routes and shapes."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "inside.npz", **self.arrays())
        told = {
            "prompt": self.prompt,
            "words": self.words,
            "sigmas": [value if np.isfinite(value) else None for value in self.sigmas.tolist()],
            "timesteps": self.timesteps.tolist(),
            "space_routes": self.space_routes.tolist(),
            "time_routes": self.time_routes.tolist(),
            "shapes": {name: list(value.shape) for name, value in self.arrays().items()},
        }
        write_json(folder / "inside.json", told)
        return [folder / "inside.npz", folder / "inside.json"]


class _Watch:
    """Keeps what the network shows at the one evaluation of every step that its callback belongs to."""

    def __init__(self) -> None:
        self.maps: list[tuple[HookCall, Tensor]] = []  # of the newest evaluation
        self.output: Any = None
        self.steps: list[tuple[float, Tensor, list[tuple[HookCall, Tensor]], Any]] = []

    @property
    def hooks(self) -> AttentionHooks:
        return AttentionHooks(edit=self.edit)

    def edit(self, call: HookCall, maps: Tensor) -> Tensor:
        if call.site.block == 0 and call.site.kind == "self":
            self.maps = []
        self.maps.append((call, maps[0].float().mean(0).cpu()))
        return maps

    def collect(self, output: Any) -> None:
        self.output = output

    def callback(self, step: int, sigma: float, x: Tensor, x0: Tensor) -> None:
        self.steps.append((sigma, x0, self.maps, self.output))


def inspect(
    parts: Parts,
    text_encoder: Any,
    prompt: str,
    seed: ImageSeed,
    settings: Sampling,
    negative_prompt: str = "",
) -> Inside:
    """Draw the image of that seed and keep what was seen on the way.

    Costs the drawing, its maps in memory (L S P^2 floats), and S decodings. Raises ValueError for a prompt that is cut.
    """
    got, room = len(text_encoder.pieces(prompt)), text_encoder.room
    if got > room:
        raise ValueError(
            f"prompt: got {got} tokens, expected at most {room}: maps are told by the words of one context"
        )
    words = [piece for piece in text_encoder.tokens_of(prompt) if piece != PAD]
    real, watch = len(words), _Watch()
    with torch.inference_mode():
        cond, null = encode_texts(parts, [prompt]), encode_texts(parts, [negative_prompt])
    device = cond.tokens.device
    noise = ImageNoise([seed], parts.latent_shape, device)
    looking = {"callback": watch.callback, "collect": watch.collect}
    latents = sample_order(parts, Order(cond.with_hooks(watch.hooks), null, noise, settings, **looking))
    sigmas = np.array([sigma for sigma, *_ in watch.steps])
    timesteps = parts.schedule.timestep(torch.from_numpy(sigmas))
    size = max((call.site.height, call.site.width) for call, _ in watch.steps[0][2])
    cross = [[_enlarged(maps[:, :real].unflatten(0, at), size) for maps, at in _kind(s, "cross")] for s in watch.steps]
    own = [[maps for maps, _ in _kind(step, "self")] for step in watch.steps]
    outputs = [output for *_, output in watch.steps]
    with torch.inference_mode():
        routes = getattr(parts.unet, "space_routes", None)
        space = routes(cond.tokens, cond.mask)[:, 0, :real].cpu().numpy() if routes else np.zeros((0, real), np.int64)
        routes = getattr(parts.unet, "time_routes", None)
        time = routes(timesteps.to(device)).cpu().numpy() if routes else np.zeros((0, len(sigmas)), np.int64)
    return Inside(
        prompt,
        words,
        sigmas,
        timesteps.double().numpy(),
        np.stack([np.stack(blocks) for blocks in cross]).astype(np.float32),
        [np.stack([step[block].numpy() for step in own]) for block in range(len(own[0]))],
        np.stack([_edges(output, size) for output in outputs]),
        np.stack([_masks(parts.unet, output, size, real) for output in outputs]),
        space,
        time,
        decode_images(parts, torch.cat([x0 for _, x0, *_ in watch.steps])),
        decode_images(parts, latents)[0],
    )


def _kind(step: tuple, kind: str) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """(map, (height, width)) of every block."""
    return ((maps, (call.site.height, call.site.width)) for call, maps in step[2] if call.site.kind == kind)


def _enlarged(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(h_l, w_l, ...) -> (h, w, ...)."""
    flat = maps.flatten(2).float() if maps.dim() > 2 else maps[..., None].float()
    large = F.interpolate(flat.permute(2, 0, 1)[None], size, mode="nearest")[0].permute(1, 2, 0)
    return (large if maps.dim() > 2 else large[..., 0]).cpu().numpy()


def _edges(output: Any, size: tuple[int, int]) -> np.ndarray:
    found = [getattr(block, "edge_logits", None) for block in output.blocks]
    heads = [_enlarged(logits[0, 0].float().sigmoid(), size) for logits in found if logits is not None]
    return np.stack(heads).astype(np.float32) if heads else np.zeros((0, *size), np.float32)


def _masks(unet: Any, output: Any, size: tuple[int, int], real: int) -> np.ndarray:
    found, threshold = [], getattr(unet.config, "mask_threshold", 0.0)
    for block in output.blocks:
        if getattr(block, "space", None) is not None:
            mask = region_mask(block.attention[:1].float(), threshold)[0, :, :real]
            found.append(_enlarged(mask.unflatten(0, (block.height, block.width)), size) > 0.5)
    return np.stack(found) if found else np.zeros((0, *size, real), bool)
