"""Files of images in a folder, by names that never lead out of it."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.places import IMAGE_FORMATS, IMAGE_SUFFIXES
from raphael.base.config.data import SourceConfig
from raphael.base.stage import StageError

MOST_BODY_BYTES = 256 << 20  # of an image that is read at all, above any limit of `download`: holes cost no disk


class ImageFiles:
    """The images below `root`. Beside `find`, what Collection asks for."""

    def __init__(self, source: SourceConfig):
        self.root = Path(source.path)
        if not source.path or not self.root.is_dir():
            raise StageError(f"source.path: got {source.path!r}, expected a folder; set source.path in params.yaml")
        self.real = self.root.resolve()

    def names(self) -> list[str]:
        """Of every image, sorted."""
        found = (path for path in self.root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        return [path.relative_to(self.root).as_posix() for path in sorted(found)]

    def is_inside(self, path: Path) -> bool:
        """Whether what a path leads to lies in the folder: an archive from a stranger can hold links to your files."""
        return path.resolve().is_relative_to(self.real)

    def path(self, name: str) -> Path | None:
        """None where it is no image, or leads out of the folder by dots or by a link."""
        try:
            path = (self.root / name).resolve()
            is_inside = path.is_relative_to(self.real) and path.suffix.lower() in IMAGE_SUFFIXES
            return path if is_inside and path.is_file() else None
        except (OSError, ValueError):  # unreadable; a NUL in the name
            return None

    def size(self, name: str) -> tuple[int, int]:
        """Raises OSError also for a link out of the folder, whose size nobody is told."""
        from PIL import Image

        if (path := self.path(name)) is None:
            raise OSError(f"{name}: no image of this folder")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.size

    def body(self, name: str) -> bytes | None:
        path = self.path(name)
        try:
            if path is None:
                return None
            with open(path, "rb") as file:
                return file.read(MOST_BODY_BYTES)
        except OSError:
            return None

    def close(self) -> None:
        pass
