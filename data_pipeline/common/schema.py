"""Names of columns: what LAION's releases and COYO call them, and what this pipeline calls them. Nowhere else.

The releases disagree: `URL`/`url`, `TEXT`/`caption`/`text`, four spellings of the aesthetic score, two scales of it.
`find_columns` says which column of a file plays which part; readers ask for parts, never for a release's spelling.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ID = "id"
URL = "url"
CAPTION = "caption"
WIDTH = "width"
HEIGHT = "height"
SIMILARITY = "similarity"
UNSAFE = "unsafe"
WATERMARK = "watermark"
AESTHETIC = "aesthetic"
LANGUAGE = "language"
MD5 = "md5"

SCORES = (SIMILARITY, UNSAFE, WATERMARK, AESTHETIC)
LINK_COLUMNS = (ID, URL, CAPTION, WIDTH, HEIGHT, *SCORES)  # links.parquet

KEY = "key"
SHARD = "shard"
SHA256 = "sha256"
SOURCE_SHA256 = "source_sha256"
STATUS = "status"
REASON = "reason"
SUCCESS = "success"
FAILED = "failed"
IMAGE_COLUMNS = (KEY, SHARD, *LINK_COLUMNS, SHA256)  # pictures.parquet
CAPTION_COLUMNS = (KEY, SHARD, CAPTION, WIDTH, HEIGHT)  # captions.parquet

# In order of preference: the first that a file has is taken. Compared as spelt, case and all: `aesthetic` (V1) and
# `AESTHETIC_SCORE` (V2) are different scores.
ALIASES: dict[str, tuple[str, ...]] = {
    URL: ("URL", "url", "Url", "image_url"),
    CAPTION: ("TEXT", "text", "caption", "CAPTION", "Text", "top_caption"),
    WIDTH: ("WIDTH", "width", "original_width"),
    HEIGHT: ("HEIGHT", "height", "original_height"),
    SIMILARITY: ("similarity", "SIMILARITY", "clip_similarity_vitl14", "clip_similarity_vitb32"),
    UNSAFE: ("punsafe", "PUNSAFE", "unsafe", "nsfw_score_opennsfw2"),
    WATERMARK: ("pwatermark", "PWATERMARK", "watermark", "watermark_score"),
    AESTHETIC: ("AESTHETIC_SCORE", "aesthetic_score", "aesthetic_score_laion_v2", "aesthetic_v2"),
    LANGUAGE: ("LANGUAGE", "language", "lang"),
    MD5: ("md5", "MD5"),  # of the image; LAION's `hash` is of url and caption
}

# LAION's V1 scorer (linear, another scale): laion2B-en-aesthetic and its siblings, relaion2B-*-aesthetic.
AESTHETIC_V1 = ("aesthetic", "aesthetic_v1", "aesthetic_score_laion_v1")

REQUIRED = (URL, CAPTION)


@dataclass(frozen=True)
class Columns:
    """Which column of a file plays which part; `missing` parts have none."""

    found: dict[str, str]
    missing: tuple[str, ...]
    aesthetic_v1: str | None  # a column that holds V1 scores, where there is no V2 column

    def __getitem__(self, part: str) -> str:
        return self.found[part]

    def __contains__(self, part: str) -> bool:
        return part in self.found


def find_columns(names: Iterable[str]) -> Columns:
    """Map the columns of a file to their parts.

    Raises ValueError, one line, where the url or the caption has no column, with the names that would have been taken.
    """
    names = list(names)
    found = {}
    for part, aliases in ALIASES.items():
        for alias in reversed(aliases):
            if alias in names:
                found[part] = alias
    for part in REQUIRED:
        if part not in found:
            got = ", ".join(names) or "(none)"
            raise ValueError(f"got columns {got}, expected one for the {part}: any of {', '.join(ALIASES[part])}")
    v1 = next((name for name in AESTHETIC_V1 if name in names), None) if AESTHETIC not in found else None
    return Columns(found, tuple(part for part in ALIASES if part not in found), v1)
