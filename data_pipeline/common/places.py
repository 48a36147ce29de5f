"""Where the files of the data stages lie in a workspace. Each path is written by the stage that its comment names."""

from __future__ import annotations

from pathlib import Path

SOURCE = Path("data/source")  # source
METADATA = SOURCE / "metadata.parquet"
REPEATS = "repeats"  # a column of it, where some images come more often than others in an epoch
LINKS = Path("data/selected/links.parquet")  # select
SHARDS = Path("data/shards")  # download
SCORED = Path("data/scores")  # score
SCORES_FACTS = "scores.json"  # in SCORED: which scores were computed
FILTERED = Path("data/filtered/pictures.parquet")  # filter
CAPTIONS = Path("data/captions/captions.parquet")  # captions
DROPPED = Path("reports/dropped.json")  # captions; shown by the report

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}  # of files in a folder of images
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # of those files; no other decoder of Pillow's is ever reached
