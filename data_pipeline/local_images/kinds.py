"""Which class reads which kind of collection, and which kind lies at a place: what `raphael data check` and
`raphael train --data` need not be told."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.addresses import files_at
from data_pipeline.common.places import IMAGE_SUFFIXES
from data_pipeline.common.tables import is_remote, open_parquet
from data_pipeline.local_images.coco import Coco
from data_pipeline.local_images.collection import Collection
from data_pipeline.local_images.folder import Folder
from data_pipeline.local_images.metadata import METADATA_NAMES
from data_pipeline.local_images.parquet_rows import ParquetRows, image_column
from data_pipeline.local_images.tars import Tars
from raphael.base.config.data import SourceConfig
from raphael.base.stage import StageError

EXPECTED = (
    "a folder of images with captions (.txt beside them, or metadata.jsonl, .csv or .parquet), COCO's "
    "captions_train2017*.json beside train2017/, parquet files that hold images, or webdataset's tars"
)


KINDS = {"coco": Coco, "folder": Folder, "pictures": ParquetRows, "webdataset": Tars}


def open_collection(source: SourceConfig) -> Collection:
    """What source.kind and source.path name. Raises StageError, one line, where nothing is there."""
    return KINDS[source.kind](source)


def kind_of(place: str | Path) -> str:
    """A source.kind of LOCAL_KINDS. Raises StageError that says what was looked for, or that images are links."""
    path = Path(place)
    if not is_remote(place) and not path.exists():
        raise StageError(f"{place}: no such file or folder; expected {EXPECTED}")
    if is_remote(place) or path.is_file():
        if str(place).endswith(".tar"):
            return "webdataset"
        return _of_parquet(place)
    if any(path.glob("captions_train2017*.json")) or any(path.glob("annotations/captions_train2017*.json")):
        return "coco"
    names = {file.suffix.lower() for file in path.rglob("*") if file.is_file() and file.name not in METADATA_NAMES}
    if names & IMAGE_SUFFIXES:
        return "folder"
    if ".tar" in names:
        return "webdataset"
    if ".parquet" in names:
        return _of_parquet(place)
    raise StageError(f"{place}: no image in it; expected {EXPECTED}")


def _of_parquet(place: str | Path) -> str:
    first = files_at(str(place), ".parquet")[0]
    image_column(open_parquet(first).schema_arrow, "", str(first))
    return "pictures"
