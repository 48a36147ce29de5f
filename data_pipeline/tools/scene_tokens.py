"""Which rows of a text encoder's token table the drawn scenes need: those of every caption that can be drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.source.scene_captions import caption, heldout_prompts
from data_pipeline.source.scenes import scene_of_row

if TYPE_CHECKING:
    from torch import Tensor

CAPTIONS = 20_000  # every form of sentence with every word, many times over; tests hold the grammar against it
HELDOUT = 200
BYTES = 512  # of CLIP's byte-pair table: each byte, and each at the end of a word: any text tokenises into those


def scene_token_ids(tokenize: Callable[[list[str]], Tensor], seen: set[int] = frozenset()) -> list[int]:
    """Sorted ids: of single bytes (letters and digits with them), of the drawn captions' words, and `seen`.

    tokenize: texts -> ids (B, N). A function of the grammar and `seen` alone, so that the same encoder is exported to
    the same bytes whatever corpus a training had.
    """
    texts = [entry["prompt"] for entry in heldout_prompts(0, HELDOUT, 64, 0.12)]  # "one" is in no training caption
    for row in range(CAPTIONS):
        scene = scene_of_row(0, row, (64, 64), 0.0)
        texts.append(caption(scene, random.Random(f"tokens/{row}"))[0])
    words = sorted({word for text in texts for word in text.split()})  # tokens never reach across a blank
    return sorted({*range(BYTES), *seen, *_ids(tokenize, [*words, ""])})


def seen_token_ids(records: Path, tokenize: Callable[[list[str]], Tensor], prompts: list[str]) -> set[int]:
    """Ids in the records (none where the folder is absent) and in the prompts."""
    found = _ids(tokenize, prompts)
    if records.is_dir():
        import numpy as np

        from raphael.base.records import TOKEN_IDS, Records

        opened: Any = Records(records, verify=False)
        for start in range(0, len(opened), 4096):
            batch = opened.batch(np.arange(start, min(start + 4096, len(opened))))
            found |= set(np.unique(batch[TOKEN_IDS]).tolist())
    return found


def _ids(tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> set[int]:
    return set(tokenize(texts).unique().tolist()) if texts else set()
