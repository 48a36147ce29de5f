"""A folder of images as a measured set: which files, in which order, prepared how; each whole, or an error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raphael.base.images.colours import to_rgb, upright
from raphael.base.images.fit import read_image
from raphael.base.stage import StageError, file_sha256, read_json

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LISTING = "images.json"  # what `raphael generate` and the stage generate write beside their images


@dataclass(frozen=True)
class Preparation:
    """crop: "centre" (to the short side) or "none"; size_px: the side after Lanczos, 0: as they are."""

    crop: str
    size_px: int

    def __call__(self, image: Any) -> np.ndarray:
        """A PIL image -> uint8 (H, W, 3)."""
        from PIL import Image

        if self.crop == "centre":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.size_px and image.size != (self.size_px, self.size_px):
            image = image.resize((self.size_px, self.size_px), Image.Resampling.LANCZOS)
        return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class ImageFolder:
    """files: in the order of images.json, or of their names. listing: images.json, {} where there is none."""

    folder: Path
    files: tuple[Path, ...]
    listing: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path, endings: Sequence[str] = ENDINGS) -> ImageFolder:
        """Raises StageError for a folder that is absent or holds no such images."""
        folder = Path(folder)
        if not folder.is_dir():
            raise StageError(f"{folder}: no such folder; expected one with images ({', '.join(endings)})")
        listing = read_json(folder / LISTING) if (folder / LISTING).is_file() else {}
        if listing:
            try:
                files = tuple(folder / entry["file"] for entry in listing["images"])
            except (KeyError, TypeError):
                raise StageError(f"{folder / LISTING}: expected images: [{{file, prompt, index}}, ...]") from None
        else:
            files = tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in endings))
        if not files:
            others = sorted({path.suffix.lower() for path in folder.iterdir() if path.suffix.lower() in ENDINGS})
            found = f" (there are {', '.join(others)}: write them as one of these)" if others else ""
            raise StageError(f"{folder}: got no images, expected files that end in {', '.join(endings)}{found}")
        foreign = [path.name for path in files if path.suffix.lower() not in endings]
        if foreign:
            raise StageError(f"{folder / foreign[0]}: the protocol takes {', '.join(endings)}; write it as such")
        return cls(folder, files, listing)

    def digest(self) -> str:
        """sha256 over the files' names and contents, in order."""
        digest = hashlib.sha256()
        for path in self.files:
            if not path.is_file():
                raise StageError(f"{path}: no such image though {LISTING} lists it; generate the images again")
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
        return digest.hexdigest()

    def prepared(self, prepare: Preparation, only_size_px: int = 0, files: slice = slice(None)) -> Iterator[np.ndarray]:
        """Prepared images, uint8 (H, W, 3). only_size_px: the one side they may have before, 0: any.

        Raises StageError for an image that is missing, broken or of another size.
        """
        for path in self.files[files]:
            yield read_prepared(path, prepare, only_size_px)


def read_prepared(path: Path, prepare: Preparation, only_size_px: int = 0) -> np.ndarray:
    """One prepared image, upright; its values are taken as stored, whatever its profile says, as torch-fidelity and
    clean-fid take them: published numbers are of those.

    Raises StageError where it is missing, truncated, broken or of another size.
    """

    def prepared(image: Any) -> np.ndarray:
        if only_size_px and image.size != (only_size_px, only_size_px):
            raise StageError(
                f"{path}: got {image.width} x {image.height} px, the protocol takes only {only_size_px} x "
                f"{only_size_px}; generate or prepare the images at that size"
            )
        return prepare(to_rgb(upright(image), profiles=False))

    return read_image(path, prepared, "generate or fetch it again")
