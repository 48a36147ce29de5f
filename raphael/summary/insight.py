"""A generated image from inside: the pixels each word attends to, the edges the network sees, the routes.

Taken in one extra forward per image: the finished latents are noised again to timestep t and the network is asked
once, with the prompt, what it sees there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raphael.diffusion.prediction import training_pair
from raphael.diffusion.sampling import ImageNoise, ImageSeed, Parts, encode_texts, evaluating
from raphael.net.moe.parts import edge_maps, word_routes


@dataclass
class Insight:
    """Letters: n images, L blocks, N tokens, h x w the largest map of the network, S the tokens of a prompt."""

    timestep: int
    words: list[list[str]]  # (n, N) the word each token belongs to; "" for padding
    attention: (
        np.ndarray
    )  # (n, N, h, w) float32: mean over the blocks with the largest map, each token's maximum scaled to 1
    edges: np.ndarray  # (n, h, w) float32: predicted edge probability, mean over those blocks; 0 without heads
    block_edges: list[np.ndarray]  # L of (n, h_l, w_l) float32: every block's own; empty without heads
    routes: np.ndarray  # (n, L, N) int64: the space expert of every token in every block


def look_inside(
    parts: Parts,
    text_encoder: Any,
    prompts: list[str],
    latents: torch.Tensor,
    seeds: list[ImageSeed],
    timestep: int | None = None,
) -> Insight:
    """Look at generated latents (n, C, h, w) at a timestep (default: 30 % of T: shapes stand, edges are open)."""
    device = latents.device
    timestep = int(0.3 * parts.schedule.num_steps) if timestep is None else timestep
    times = torch.full((len(prompts),), timestep, device=device)
    noise = ImageNoise(seeds, parts.latent_shape, device).start()
    noised, _ = training_pair(parts.prediction, parts.schedule, latents, noise, times)
    with evaluating(parts.unet), torch.inference_mode():
        cond = encode_texts(parts, prompts)
        output = parts.unet(noised, times.float(), cond, collect=True)
        routes = word_routes(parts.unet, cond)
    largest = max(block.height * block.width for block in output.blocks)
    chosen = [block for block in output.blocks if block.height * block.width == largest]
    height, width = chosen[0].height, chosen[0].width
    maps = torch.stack([block.attention.float() for block in chosen]).mean(0).mT.unflatten(2, (height, width))
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
    heads = edge_maps(output)
    large = [edges for edges in heads if edges.shape[1:] == (height, width)]
    edges = torch.stack(large).mean(0) if large else torch.zeros_like(maps[:, 0])
    return Insight(
        timestep,
        [token_words(text_encoder, prompt, cond.tokens.shape[1]) for prompt in prompts],
        maps.cpu().numpy(),
        edges.cpu().numpy(),
        [edges.cpu().numpy() for edges in heads],
        routes.permute(1, 0, 2).cpu().numpy(),
    )


def token_words(text_encoder: Any, prompt: str, length: int) -> list[str]:
    """The word at each of the context's positions, "" for padding."""
    words = ["" if word == "<pad>" else word for word in text_encoder.tokens_of(prompt)[:length]]
    return words + [""] * (length - len(words))
