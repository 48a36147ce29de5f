"""What every kind of source leaves: a fresh folder, the held-out prompts, a table of rows."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_pipeline.common.places import REPEATS
from data_pipeline.common.tables import write_table
from raphael.base.stage import write_json

REPORTING_PROMPTS = "prompts.json"  # what an evaluation generates; nothing is chosen by them
CHOOSING_PROMPTS = "choosing.json"  # of other scenes: to choose guidance, steps and the like by


def fresh_folder(work: Path) -> Path:
    folder = work / "source"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def write_prompts(folder: Path, source: str, prompts: list[dict], name: str = REPORTING_PROMPTS) -> None:
    write_json(folder / name, {"source": source, "prompts": prompts})


METADATA_TYPES = {
    "URL": "string", "TEXT": "string", "WIDTH": "int32", "HEIGHT": "int32",
    "similarity": "float64", "punsafe": "float64", "pwatermark": "float64", "AESTHETIC_SCORE": "float64",
    "id": "int64", "url": "string", "caption": "string", "fault": "string", "truth": "string",
    REPEATS: "int32",
}  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> None:
    """A parquet file of metadata or truth rows; their first row names the columns."""
    import pyarrow as pa

    columns = list(rows[0])
    schema = pa.schema([(name, pa.type_for_alias(METADATA_TYPES[name])) for name in columns])
    write_table(pa.Table.from_pylist(rows, schema), path)
