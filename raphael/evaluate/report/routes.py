"""Which experts words and timesteps go through (RAPHAEL, section 3.1 and figure 9).

Without its training noise a space gate reads the text alone and a time gate the timestep alone, so both are tables of
the model: no image needs to be generated for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raphael.generate.pipeline import RaphaelPipeline

TIME_POINTS = 100


def token_routes(pipeline: RaphaelPipeline, prompt: str) -> list[dict[str, Any]]:
    """[{"word", "experts": [one per block, in the order of the forward pass]}] for every token but padding."""
    import torch

    from raphael.summary.insight import token_words

    with torch.inference_mode():
        cond = pipeline.encode([prompt])
        routes = pipeline.unet.space_routes(cond.tokens, cond.mask)[:, 0]  # (blocks, N)
    words = token_words(pipeline.text_encoder, prompt, routes.shape[1])
    return [
        {"word": word, "experts": routes[:, position].tolist()}
        for position, word in enumerate(words)
        if word and bool(cond.mask[0, position])
    ]


def time_table(pipeline: RaphaelPipeline, points: int = TIME_POINTS) -> dict[str, Any]:
    """{"timesteps": [...], "experts": [[per timestep] per block]}: even steps from 0 (clean) to T - 1 (noise)."""
    import torch

    last = pipeline.diffusion.num_steps - 1
    timesteps = torch.linspace(0, last, min(points, last + 1)).round()
    with torch.inference_mode():
        experts = pipeline.unet.time_routes(timesteps.to(pipeline.device))
    return {"timesteps": timesteps.int().tolist(), "experts": experts.tolist()}


def routes_text(prompt: str, words: list[dict[str, Any]], times: dict[str, Any]) -> str:
    """Both tables as text for a terminal: a digit is an expert (from 1), a column a block or a timestep."""
    blocks = len(times["experts"])
    width = max([len(entry["word"]) for entry in words] + [5])
    lines = [f'space experts of the words of "{prompt}"', "", f"{'block':>{width}}  " + _row(range(blocks))]
    lines += [f"{entry['word']:>{width}}  " + _row(entry["experts"]) for entry in words]
    last = times["timesteps"][-1]
    lines += ["", f"time experts, from t = 0 (clean, left) to t = {last} (noise, right)", ""]
    lines += [
        f"block {block + 1:>3}  " + "".join(_digit(expert) for expert in row)
        for block, row in enumerate(times["experts"])
    ]
    return "\n".join(lines)


def _row(experts) -> str:
    return " ".join(f"{expert + 1:>2}" for expert in experts)


def _digit(expert: int) -> str:
    return "123456789abcdefghijklmnopqrstuvwxyz"[expert]
