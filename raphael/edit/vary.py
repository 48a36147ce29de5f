"""Images like an image, and images between two: along the great circle of their noise, or of what the network reads.

Noise of many dimensions lies close to a sphere, and a straight line between two points of it leads through its inside,
where a denoiser has never been: hence slerp (as DDIM, arXiv 2010.02502, section 5.3, and unCLIP, arXiv 2204.06125, do).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from raphael.diffusion.sampling import ImageNoise
from raphael.edit.run import Edited, How, Session, check_share, joined, split
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import Condition


def slerp(start: Tensor, end: Tensor, share: float, dims: tuple[int, ...]) -> Tensor:
    """sin((1 - s) w) / sin w start + sin(s w) / sin w end, w the angle between them over `dims`; both ends exact.

    Where they are parallel it is the straight line.
    """
    if share in (0.0, 1.0):
        return end if share else start
    lengths = torch.linalg.vector_norm(start, dim=dims, keepdim=True)
    lengths = lengths * torch.linalg.vector_norm(end, dim=dims, keepdim=True)
    cosine = ((start * end).sum(dims, keepdim=True) / lengths.clamp(min=1e-12)).clamp(-1, 1)
    angle = cosine.arccos()
    straight = (1 - cosine.abs()) < 1e-6
    safe = torch.where(straight, torch.ones_like(angle), angle)
    first = torch.where(straight, torch.full_like(angle, 1 - share), ((1 - share) * safe).sin() / safe.sin())
    second = torch.where(straight, torch.full_like(angle, share), (share * safe).sin() / safe.sin())
    return first * start + second * end


def variations(
    pipeline: Pipeline,
    prompt: str,
    strength: float = 0.3,
    how: How = How(),  # noqa: B008
) -> Edited:
    """how.num_images images like the one of (seed, 0): its noise, moved by `strength` towards that of another index.

    Strength 0 is the image itself, 1 another image of the prompt. without: the other image. Raises ValueError for a
    strength outside 0 to 1.
    """
    check_share("strength", strength)
    session = Session(pipeline, how)
    n = session.count
    own = ImageNoise([(how.seed, 0)] * n, session.parts.latent_shape, session.device).start()
    others = [(how.seed, 1 + index) for index in range(n)]
    other = ImageNoise(others, session.parts.latent_shape, session.device).start()
    start = torch.cat([own, slerp(own, other, strength, (1, 2, 3)), other])
    cond = session.condition(prompt, prompt, prompt)
    source, result, without = split(session.decode(session.draw(cond, start=start), cond), 3)
    facts = session.facts("vary", prompt=prompt, strength=strength)
    return Edited(source, result, without, ("seed's own", f"varied by {strength:g}", "another's"), facts)


def interpolate(
    pipeline: Pipeline,
    prompt: str,
    target: str | None = None,
    target_seed: int | None = None,
    how: How = How(),  # noqa: B008
) -> Edited:
    """how.num_images images from one prompt or seed to another, ends included: equal steps along the great circle.

    target: the other prompt, target_seed: the other seed, of whose index 0 the end is; one of them or both. source: the
    first end; without: the two ends mixed pixel by pixel, which is not an image of the model. Raises ValueError for
    neither, and fewer than 2 images.
    """
    if target is None and target_seed is None:
        raise ValueError("interpolate: got one prompt and one seed, expected another prompt, another seed or both")
    if how.num_images < 2:
        raise ValueError(f"num_images: got {how.num_images}, expected at least 2, the ends")
    session = Session(pipeline, how)
    n, shape = session.count, session.parts.latent_shape
    shares = [index / (n - 1) for index in range(n)]
    first, last = (
        ImageNoise([(seed, 0)], shape, session.device).start()
        for seed in (how.seed, how.seed if target_seed is None else target_seed)
    )
    start = torch.cat([slerp(first, last, share, (1, 2, 3)) for share in shares])
    one, other = session.condition(prompt).rows([0]), session.condition(target or prompt).rows([0])
    cond = joined([between(one, other, share) for share in shares])
    # every image has the fresh noise of index 0, where a sampler adds any
    session.seeds = [(how.seed, 0)] * n
    images = session.decode(session.draw(cond, start=start), cond)
    mixed = np.stack([np.rint((1 - share) * images[0] + share * images[-1]) for share in shares]).astype(np.uint8)
    facts = session.facts("interpolate", prompt=prompt, target=target or prompt, target_seed=target_seed, shares=shares)
    labels = ("the first end", "between the two", "pixels mixed")
    return Edited(np.repeat(images[:1], n, 0), images, mixed, labels, facts)


def between(one: Condition, other: Condition, share: float) -> Condition:
    """Of conditions of equal rows: every token on the great circle between the two; so the vector, where there is one.

    A token that only one of them has is that one's, so that between the ends both texts' tokens are read.
    """
    if share in (0.0, 1.0):
        return other if share else one
    if one.tokens is not None and not one.tokens.is_floating_point():  # ids: there is no word between two words
        if not (torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)):
            raise ValueError("target: got another prompt, expected none: the model reads token ids, which do not mix")
        return one
    changes = {}
    if one.tokens is not None:
        tokens = slerp(one.tokens, other.tokens, share, (2,))
        if one.mask is not None and other.mask is not None:
            mine, theirs = (mask[..., None] for mask in (one.mask, other.mask))
            tokens = torch.where(mine & ~theirs, one.tokens, torch.where(theirs & ~mine, other.tokens, tokens))
            changes["mask"] = one.mask | other.mask
        changes["tokens"] = tokens
    if one.vector is not None:
        changes["vector"] = slerp(one.vector, other.vector, share, (1,))
    return dataclasses.replace(one, **changes)
