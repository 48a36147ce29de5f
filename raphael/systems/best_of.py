"""Re-ranking by CLIP, as DALL-E's samples are (arXiv 2102.12092, section 2.6): the best of many images of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raphael.encoders.image import ClipScorer, load_clip


def best_of(
    pipeline: Any, n: int, prompt: str | list[str], clip: ClipScorer | str | Path | None, call: dict[str, Any]
) -> Any:
    """`Pipeline.best_of` -> PipelineOutput. Images stand prompt by prompt, the best first; of equal ones the earlier.

    Raises ValueError for n below 1, another output_type than "pil", or a system without a CLIP.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"best_of: got {n}, expected a number of images from 1 on")
    if call.get("output_type", "pil") != "pil":
        raise ValueError(f"best_of: got output_type {call['output_type']!r}, expected pil: CLIP judges images")
    if call.get("collect"):
        raise ValueError("collect: got true with best_of, expected false: maps would be of all images")
    kept = call.pop("num_images_per_prompt", 1)
    scorer = load_clip(clip).to(pipeline.device) if isinstance(clip, (str, Path)) else clip or pipeline.scorer()
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    result = pipeline(prompts, num_images_per_prompt=n * kept, **{**call, "return_dict": True})
    chosen, scores = ranked(scorer, prompts, result.images, kept)
    images = [result.images[index] for index in chosen]
    return type(result)(images, scores=scores, indices=chosen) if call.get("return_dict", True) else (images,)


def ranked(scorer: ClipScorer, prompts: list[str], images: list[Any], kept: int) -> tuple[list[int], list[float]]:
    """The numbers of the `kept` best images of each prompt and their cosines. images: as many of each, side by side."""
    each = len(images) // len(prompts)
    texts, seen = scorer.embed_texts(prompts), scorer.embed_images(images)
    cosines = (seen * texts.repeat_interleave(each, dim=0)).sum(1).view(len(prompts), each).cpu()
    order = torch.argsort(cosines, dim=1, descending=True, stable=True)[:, :kept]
    chosen = (order + torch.arange(len(prompts))[:, None] * each).flatten().tolist()
    return chosen, cosines.gather(1, order).flatten().tolist()
