"""A folder of pictures as a measured set: which files, in which order, prepared how; each whole, or an error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raphael.stage import StageError, file_sha256, read_json

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LISTING = "images.json"  # what `raphael generate` and the stage generate write beside their pictures


@dataclass(frozen=True)
class Preparation:
    """crop: "centre" (to the short side) or "none"; size_px: the side after Lanczos, 0: as they are."""

    crop: str
    size_px: int

    def __call__(self, image: Any) -> np.ndarray:
        """A PIL picture -> uint8 (H, W, 3)."""
        from PIL import Image

        if self.crop == "centre":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.size_px and image.size != (self.size_px, self.size_px):
            image = image.resize((self.size_px, self.size_px), Image.Resampling.LANCZOS)
        return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class PictureFolder:
    """files: in the order of images.json, or of their names. listing: images.json, {} where there is none."""

    folder: Path
    files: tuple[Path, ...]
    listing: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path, endings: Sequence[str] = ENDINGS) -> PictureFolder:
        """Raises StageError for a folder that is absent or holds no such pictures."""
        folder = Path(folder)
        if not folder.is_dir():
            raise StageError(f"{folder}: no such folder; expected one with pictures ({', '.join(endings)})")
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
            raise StageError(f"{folder}: got no pictures, expected files that end in {', '.join(endings)}{found}")
        foreign = [path.name for path in files if path.suffix.lower() not in endings]
        if foreign:
            raise StageError(f"{folder / foreign[0]}: the protocol takes {', '.join(endings)}; write it as such")
        return cls(folder, files, listing)

    def digest(self) -> str:
        """sha256 over the files' names and contents, in order."""
        digest = hashlib.sha256()
        for path in self.files:
            if not path.is_file():
                raise StageError(f"{path}: no such picture though {LISTING} lists it; draw the pictures again")
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
        return digest.hexdigest()

    def pictures(self, prepare: Preparation, only_size_px: int = 0, files: slice = slice(None)) -> Iterator[np.ndarray]:
        """Prepared pictures, uint8 (H, W, 3). only_size_px: the one side they may have before, 0: any.

        Raises StageError for a picture that is missing, broken or of another size.
        """
        for path in self.files[files]:
            yield read_picture(path, prepare, only_size_px)


def read_picture(path: Path, prepare: Preparation, only_size_px: int = 0) -> np.ndarray:
    """One prepared picture. Raises StageError where it is missing, truncated, broken or of another size."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if only_size_px and image.size != (only_size_px, only_size_px):
                raise StageError(
                    f"{path}: got {image.width} x {image.height} px, the protocol takes only {only_size_px} x "
                    f"{only_size_px}; draw or prepare the pictures at that size"
                )
            return prepare(image.convert("RGB"))
    except FileNotFoundError:
        raise StageError(f"{path}: no such picture; draw the pictures again") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # Pillow's answers to a truncated or broken file
        raise StageError(f"{path}: not a whole picture ({error}); delete it and draw or fetch it again") from None
