"""The kept pictures, read out of the webdataset shards in the order of their keys, and fitted to the networks' size."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.stage import StageError

if TYPE_CHECKING:
    from PIL import Image

    from raphael.stage import Stage

FORMATS = ("PNG", "JPEG", "WEBP")  # what img2dataset writes; no other decoder of Pillow's is ever reached
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
HELDOUT_ONE_IN = 50
MIN_PICTURES = 4

SHARDS, CAPTIONS = Path("data/shards"), Path("data/captions/captions.parquet")


@dataclass(frozen=True)
class PictureSet:
    """All fitted pictures of a corpus, mapped into memory. keys, captions: in the order of images (n,H,W,3) uint8."""

    keys: list[str]
    captions: list[str]
    images: np.ndarray

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (training, held out), see `is_heldout`."""
        held = heldout(self.keys)
        return np.flatnonzero(~held), np.flatnonzero(held)


class TrainingData:
    """What the training loop reads: rows `indices` of `images`, and of further arrays by name."""

    def __init__(self, pictures: PictureSet, indices: np.ndarray, **more: np.ndarray):
        self.pictures, self.indices, self.more = pictures, indices, more
        self.keys = [pictures.keys[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.indices[np.asarray(indices)]
        arrays = {name: np.take(array, rows, axis=0) for name, array in self.more.items()}
        return {"image": np.take(self.pictures.images, rows, axis=0), **arrays}


def read_captions(path: Path) -> list[dict[str, Any]]:
    """Rows of captions.parquet as mappings with key, shard, caption; sorted by key. Raises StageError."""
    import pyarrow.parquet as pq

    from data_pipeline.schema import CAPTION, KEY, SHARD

    if not path.is_file():
        raise StageError(f"{path}: no such file; run the stage captions first (dvc repro captions)")
    try:
        rows = pq.read_table(path, columns=[KEY, SHARD, CAPTION]).to_pylist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors derive from these
        raise StageError(f"{path}: {' '.join(str(error).split())[:99]}; delete it and run the stage captions") from None
    rows.sort(key=lambda row: row[KEY])
    return rows


def read_pictures(shards: Path, captions: Path, start: int = 0) -> Iterator[tuple[str, str, Image.Image]]:
    """(key, caption, RGB picture) of every row of captions.parquet from row `start` on, in the order of the keys.

    Raises StageError, one line, that names shard and key where a picture is missing or broken.
    """
    from data_pipeline.schema import CAPTION, KEY, SHARD

    shard = Shard(None)
    try:
        for row in read_captions(captions)[start:]:
            name = str(row[SHARD])
            path = shards / (name if name.endswith(".tar") else f"{name}.tar")
            if shard.path != path:
                shard.close()
                shard = Shard(path)
            yield row[KEY], row[CAPTION], shard.picture(row[KEY])
    finally:
        shard.close()


def fit(image: Image.Image, height: int, width: int) -> np.ndarray:
    """RGB picture -> uint8 (height, width, 3): scaled (bicubic, antialiased) to cover it, cropped to the middle."""
    from PIL import Image

    scale = max(width / image.width, height / image.height)
    crop_width, crop_height = width / scale, height / scale
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box=box))


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says that it is looked at. Broken EXIF says nothing."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        return image


def heldout(keys: list[str]) -> np.ndarray:
    """Bool (n,): the one in 50 keys (at least two) whose hashes are smallest; never trained on, by either encoder.

    Raises StageError for fewer than 4 pictures.
    """
    if len(keys) < MIN_PICTURES:
        raise StageError(
            f"got {len(keys)} pictures, expected at least {MIN_PICTURES} to train on; look at reports/filter.json and "
            "reports/captions.json for what dropped the others"
        )
    order = sorted(range(len(keys)), key=lambda index: hashlib.sha256(keys[index].encode()).digest())
    held = np.zeros(len(keys), bool)
    held[order[: max(2, len(keys) // HELDOUT_ONE_IN)]] = True
    return held


def collect(stage: Stage, folder: Path, height: int, width: int) -> PictureSet:
    """Fit all pictures into one array file in `folder`, or open the one that an earlier run left there."""
    rows = read_captions(stage.root / CAPTIONS)
    path = folder / f"pictures_{height}x{width}.npy"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        shape = (len(rows), height, width, 3)
        # Not through a mapped file: on a full disk that ends the process with SIGBUS instead of an error.
        with open(partial, "wb") as file, stage.progress(len(rows), "pictures read") as bar:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _, _, picture in read_pictures(stage.root / SHARDS, stage.root / CAPTIONS):
                file.write(fit(picture, height, width).tobytes())
                bar.update()
        os.replace(partial, path)
    return PictureSet([row["key"] for row in rows], [row["caption"] for row in rows], np.load(path, mmap_mode="r"))


def shard_inputs(stage: Stage) -> list[Any]:
    """What the pictures depend on, for Stage.workdir: the captions, and the shards' names and sizes."""
    captions = stage.root / CAPTIONS
    if not captions.is_file():
        read_captions(captions)
    tars = sorted((stage.root / SHARDS).glob("*.tar"))
    if not tars:
        raise StageError(f"{SHARDS}: got no .tar file there; run the stage download first (dvc repro download)")
    return [captions, [[tar.name, tar.stat().st_size] for tar in tars]]


class Shard:
    """One tar, its pictures found by name; nothing is ever extracted to disk."""

    def __init__(self, path: Path | None):
        self.path, self.tar, self.members = path, None, {}
        if path is None:
            return
        try:
            self.tar = tarfile.open(path)
            for member in self.tar:
                key, _, extension = member.name.rpartition(".")
                if member.isfile() and extension.lower() in EXTENSIONS:
                    self.members[key] = member
        except FileNotFoundError:
            raise StageError(f"{path}: no such shard; run the stage download again (dvc repro download)") from None
        except (tarfile.TarError, EOFError) as error:
            raise StageError(f"{path}: broken shard ({error}); delete it and run the stage download again") from None

    def picture(self, key: str) -> Image.Image:
        from PIL import Image, UnidentifiedImageError

        member = self.members.get(key)
        again = "run the stages download and filter again"
        if member is None:
            raise StageError(f"{self.path}: no picture {key} in it, which captions.parquet names; {again}")
        try:
            picture = Image.open(io.BytesIO(self.tar.extractfile(member).read()), formats=FORMATS)
            return upright(picture).convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            detail = " ".join(str(error).split())[:120]
            raise StageError(f"{self.path}: picture {key} cannot be decoded ({detail}); {again}") from None

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
