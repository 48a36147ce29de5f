"""Held-out scenes whose captions also come with one fact exchanged: what the probe (raphael/objectives/probe.py) asks.

One file, data/source/probe.npz, written by the stage `source` where scenes are drawn; real data have no such truth.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.files import written_whole
from raphael.base.stage import StageError

PROBE = "probe.npz"  # in data/source
FACTS = ("shape", "colour", "background", "style", "count", "pair_shape", "side", "binding", "word")


@dataclass(frozen=True)
class Exchange:
    """Of one fact: which images it was exchanged for, int64 (n,), and the captions that are wrong in it alone."""

    rows: np.ndarray
    captions: list[str]


@dataclass(frozen=True)
class ProbeSet:
    images: np.ndarray  # uint8 (M, H, W, 3)
    captions: list[str]  # (M,) true in everything
    suites: list[str]
    truths: list[dict[str, Any]]  # in the form of prompts.json
    facts: dict[str, Exchange]  # some of FACTS

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def rows(self) -> np.ndarray:
        """The images that any fact asks of, int64, in their order."""
        return np.unique(np.concatenate([fact.rows for fact in self.facts.values()]))

    def take(self, n: int) -> ProbeSet:
        """The first n exchanges of every fact; images stay, so that their places do."""
        return ProbeSet(
            self.images,
            self.captions,
            self.suites,
            self.truths,
            {name: Exchange(fact.rows[:n], fact.captions[:n]) for name, fact in self.facts.items()},
        )

    def entries(self) -> list[dict[str, Any]]:
        """The scenes as prompts.json has prompts: prompt, suite, truth."""
        texts = zip(self.captions, self.suites, self.truths, strict=True)
        return [{"prompt": text, "suite": suite, "truth": truth} for text, suite, truth in texts]

    def write(self, path: Path) -> None:
        """Equal sets give equal bytes. Atomic."""
        texts = {
            "captions": self.captions,
            "suites": self.suites,
            "truths": self.truths,
            "facts": {name: [fact.rows.tolist(), fact.captions] for name, fact in self.facts.items()},
        }
        told = np.frombuffer(json.dumps(texts, ensure_ascii=False).encode(), np.uint8)
        with written_whole(path) as temporary:
            np.savez_compressed(temporary, images=self.images, texts=told)


def read_probe_set(path: str | Path) -> ProbeSet:
    """Raises StageError, one line, where the file is missing, broken or of another form."""
    path = Path(path)
    again = "run the stage source of a workspace of drawn scenes (source.kind: scenes)"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, texts = file["images"], json.loads(file["texts"].tobytes())
        facts = {name: Exchange(np.asarray(rows, np.int64), told) for name, (rows, told) in texts["facts"].items()}
        found = ProbeSet(images, texts["captions"], texts["suites"], texts["truths"], facts)
    except FileNotFoundError:
        raise StageError(f"{path}: no such file, expected held-out scenes for the probe; {again}") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StageError(f"{path}: not a probe set ({error}); delete it and {again}") from None
    lengths = {len(images), len(found.captions), len(found.suites), len(found.truths)}
    if images.dtype != np.uint8 or images.ndim != 4 or len(lengths) != 1 or set(facts) - set(FACTS):
        raise StageError(f"{path}: not a probe set (got images {images.dtype} {images.shape}); delete it and {again}")
    return found
