"""The kept images, read out of the webdataset shards in the order of their keys, and fitted to the networks' size."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.common.caption_rows import CaptionRow, CaptionRows
from data_pipeline.common.places import CAPTIONS, SHARDS
from data_pipeline.common.schema import KEY, SHA256
from raphael.base.files import written_whole
from raphael.base.images.colours import as_seen
from raphael.base.images.fit import FORMATS, fit
from raphael.base.integrity.pieces import Pieces
from raphael.base.stage import HASHED_WHOLE_BYTES, StageError, file_sha256

if TYPE_CHECKING:
    from PIL import Image

    from raphael.base.stage import Stage


EXTENSIONS = ("png", "jpg", "jpeg", "webp")
HELDOUT_ONE_IN = 50
MIN_IMAGES = 4


@dataclass(frozen=True)
class ImageSet:
    """All fitted images of a corpus, mapped into memory. keys, captions: in the order of images (n,H,W,3) uint8."""

    keys: list[str]
    captions: list[str]
    images: np.ndarray

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices (training, held out), see `is_heldout`."""
        held = heldout(self.keys)
        return np.flatnonzero(~held), np.flatnonzero(held)


class TrainingData:
    """What the training loop reads: rows `indices` of `images`, and of further arrays by name."""

    def __init__(self, image_set: ImageSet, indices: np.ndarray, **more: np.ndarray):
        self.image_set, self.indices, self.more = image_set, indices, more
        self.keys = [image_set.keys[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.indices[np.asarray(indices)]
        arrays = {name: np.take(array, rows, axis=0) for name, array in self.more.items()}
        return {"image": np.take(self.image_set.images, rows, axis=0), **arrays}


def read_captions(path: Path) -> list[dict[str, Any]]:
    """All rows of captions.parquet as mappings with key, shard, caption; sorted by key. Raises StageError. Some 500
    bytes a row: what can do with one after the other takes CaptionRows."""
    return [vars(row) for row in CaptionRows(path)]


def read_images(shards: Path, rows: Iterable[CaptionRow]) -> Iterator[tuple[CaptionRow, Image.Image]]:
    """(row, RGB image) of the rows, in their order; each shard is opened once where its rows lie side by side.

    Raises StageError, one line, that names shard and key where an image is missing or broken.
    """
    reader = ShardReader(shards)
    try:
        for row in rows:
            yield row, reader.image(row)
    finally:
        reader.close()


class ShardReader:
    """The images of rows, the shard that was read last kept open. folder: of the shards."""

    def __init__(self, folder: Path):
        self.folder, self.shard = folder, Shard(None)

    def image(self, row: CaptionRow) -> Image.Image:
        """RGB. Raises StageError that names shard and key."""
        path = self.folder / (row.shard if row.shard.endswith(".tar") else f"{row.shard}.tar")
        if self.shard.path != path:
            self.shard.close()
            self.shard = Shard(path)
        return self.shard.image(row.key)

    def original(self, row: CaptionRow) -> tuple[int, int]:
        """(height, width) in px of the image as it was found, of the shard that was read last. Raises StageError."""
        return self.shard.original(row.key)

    def close(self) -> None:
        self.shard.close()


def heldout(keys: list[str]) -> np.ndarray:
    """Bool (n,): the one in 50 keys (at least two) whose hashes are smallest; never trained on, by either encoder.

    Raises StageError for fewer than 4 images.
    """
    if len(keys) < MIN_IMAGES:
        raise StageError(
            f"got {len(keys)} images, expected at least {MIN_IMAGES} to train on; look at reports/filter.json and "
            "reports/captions.json for what dropped the others"
        )
    order = sorted(range(len(keys)), key=lambda index: hashlib.sha256(keys[index].encode()).digest())
    held = np.zeros(len(keys), bool)
    held[order[: max(2, len(keys) // HELDOUT_ONE_IN)]] = True
    return held


def collect(stage: Stage, folder: Path, height: int, width: int, pad: bool = False) -> ImageSet:
    """Fit all images into one array file in `folder`, or open the one that an earlier run left there. pad: as `fit`."""
    rows = read_captions(stage.root / CAPTIONS)
    path = folder / f"pictures_{height}x{width}.npy"
    pieces = Pieces(folder, stage.name)
    if not pieces.has(path):
        shape = (len(rows), height, width, 3)
        # Not through a mapped file: on a full disk that ends the process with SIGBUS instead of an error.
        with (
            written_whole(path) as temporary,
            open(temporary, "wb") as file,
            stage.progress(len(rows), "images read") as bar,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _, image in read_images(stage.root / SHARDS, CaptionRows(stage.root / CAPTIONS)):
                file.write(fit(image, height, width, pad=pad).tobytes())
                bar.update()
        pieces.add(path)
    return ImageSet([row["key"] for row in rows], [row["caption"] for row in rows], np.load(path, mmap_mode="r"))


def drop_collected(folder: Path) -> None:
    """Remove what `collect` left, once the training is published: a second copy of all images. Checkpoints stay."""
    for path in folder.glob("pictures_*.npy"):
        path.unlink()


def shard_inputs(stage: Stage) -> list[Any]:
    """What the images depend on, for Stage.workdir: the captions, and the shards' names, sizes and, of those that are
    not too large for it, bytes: a tar is padded, so that another one may well be as large."""
    captions = stage.root / CAPTIONS
    if not captions.is_file():
        read_captions(captions)
    tars = sorted((stage.root / SHARDS).glob("*.tar"))
    if not tars:
        raise StageError(f"{SHARDS}: got no .tar file there; run the stage download first (dvc repro download)")
    stage.expect_whole(*tars)
    sizes = {tar: tar.stat().st_size for tar in tars}
    return [
        captions,
        [[tar.name, size, file_sha256(tar) if size <= HASHED_WHOLE_BYTES else ""] for tar, size in sizes.items()],
    ]


class Shard:
    """One tar, its images found by name, each compared with its sha256 in the table beside the tar: decoders make an
    image of most flipped bits. Nothing is ever extracted to disk."""

    def __init__(self, path: Path | None):
        self.path, self.tar, self.members, self.digests = path, None, {}, {}
        self.originals: dict[str, tuple[int, int]] | None = None  # read where they are asked for
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
        self.digests = stored_hashes(path.with_suffix(".parquet"))

    def image(self, key: str) -> Image.Image:
        from PIL import Image, UnidentifiedImageError

        member = self.members.get(key)
        again = "run the stages download and filter again"
        if member is None:
            raise StageError(f"{self.path}: no image {key} in it, which captions.parquet names; {again}")
        try:
            body = self.tar.extractfile(member).read()
            if (got := hashlib.sha256(body).hexdigest()) != self.digests.get(key, got):
                raise StageError(
                    f"{self.path}: image {key} is damaged: got sha256 {got[:12]}..., expected "
                    f"{self.digests[key][:12]}...; delete the shard, then dvc checkout, or run the stage download"
                )
            return as_seen(Image.open(io.BytesIO(body), formats=FORMATS))
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
            detail = " ".join(str(error).split())[:120]
            raise StageError(f"{self.path}: image {key} cannot be decoded ({detail}); {again}") from None

    def original(self, key: str) -> tuple[int, int]:
        """(height, width) before it was stored. Raises StageError where the table beside the tar does not say it."""
        table = self.path.with_suffix(".parquet")
        if self.originals is None:
            self.originals = stored_originals(table)
        if key not in self.originals:
            raise StageError(f"{table}: got no size of the image {key} as it was found; run the stage download again")
        return self.originals[key]

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()


def stored_hashes(table: Path) -> dict[str, str]:
    """sha256 of a shard's images by key, as they were stored; {} where there is no such table."""
    if not table.is_file():
        return {}
    from data_pipeline.common.tables import open_parquet

    file = open_parquet(table)
    if not {KEY, SHA256} <= set(file.schema_arrow.names):
        return {}
    columns = file.read(columns=[KEY, SHA256])
    pairs = zip(columns[KEY].to_pylist(), columns[SHA256].to_pylist(), strict=True)
    return {key: digest for key, digest in pairs if digest}


def stored_originals(table: Path) -> dict[str, tuple[int, int]]:
    """(height, width) of a shard's images as they were found, by key; {} where there is no such table."""
    if not table.is_file():
        return {}
    from data_pipeline.common.tables import open_parquet

    file, names = open_parquet(table), (KEY, "original_height", "original_width")
    if not set(names) <= set(file.schema_arrow.names):
        return {}
    columns = file.read(columns=list(names)).to_pydict()
    found = zip(*(columns[name] for name in names), strict=True)
    return {key: (height, width) for key, height, width in found if key and height and width}
