"""A folder of images with captions: beside each image (.txt, kohya's .caption), in a metadata file (Hugging Face's
imagefolder), or, where asked for, in the names of the images.

kohya's folders say in their name how often their images come in an epoch, and what is on those that have no caption:
`10_sks dog/` is ten times "sks dog".
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath

from data_pipeline.local_images.collection import NO_CAPTION, NOT_HERE, OUTSIDE, Captioned, Found
from data_pipeline.local_images.files import ImageFiles
from data_pipeline.local_images.metadata import METADATA_NAMES, caption_rows
from raphael.base.config.data import SourceConfig
from raphael.base.stage import StageError

SIDECARS = (".txt", ".caption")  # in this order: the first that is there
KOHYA = re.compile(r"([1-9]\d{0,2})_(.+)")  # a year, 2024_holidays, is no number of repeats
MAX_TEXT_BYTES = 4 << 20  # of a caption's file
UNLISTED = "not in the metadata file"


class Folder(ImageFiles):
    def __init__(self, source: SourceConfig):
        super().__init__(source)
        self.source = source
        looked = {
            "sidecar": f"images, each with a {' or '.join(SIDECARS)} of the same name",
            "metadata": f"{', '.join(METADATA_NAMES)} with columns file_name and text",
            "file_name": "images whose file names say what is on them",
        }
        auto = f"{looked['sidecar']}, or {looked['metadata']}; source.captions: file_name takes the images' file names"
        self.expected = auto if source.captions == "auto" else f"{looked[source.captions]} (source.captions)"

    def find(self, dropped: Counter[str]) -> Found:
        """Raises StageError where captions are asked for from metadata files and none is there, or one is broken."""
        names = self.names()
        places = (path for name in METADATA_NAMES for path in self.root.rglob(name))
        files = sorted(path for path in places if path.is_file() and self.is_inside(path))
        if self.source.captions == "metadata" and not files:
            raise StageError(f"{self.root}: got none of {', '.join(METADATA_NAMES)}, which source.captions asks for")
        if files and self.source.captions in ("auto", "metadata"):
            listed: dict[str, list[str]] = {}
            for file in files:
                base = file.parent.relative_to(self.root)
                for name, captions in caption_rows(file, self.source.caption_column):
                    listed.setdefault(_joined(base.as_posix(), name), []).extend(captions)
            return Found(self._listed(names, listed, dropped), None, {"captions": "metadata"})
        said = "file_name" if self.source.captions == "file_name" else "sidecar"
        return self._beside(names, said, dropped)

    def _listed(self, names: list[str], listed: dict[str, list[str]], dropped: Counter[str]) -> list[Captioned]:
        rows = []
        for name, captions in sorted(listed.items()):
            if self.path(name) is None:
                dropped[OUTSIDE if ".." in PurePosixPath(name).parts else NOT_HERE] += max(1, len(captions))
            elif not captions:
                dropped[NO_CAPTION] += 1
            else:
                rows += [Captioned(name, caption) for caption in captions]
        dropped[UNLISTED] += len(set(names) - set(listed))
        return rows

    def _beside(self, names: list[str], said: str, dropped: Counter[str]) -> Found:
        """An image's caption file (its lines are so many captions), the words of its kohya folder, or its own name."""
        folders = _kohya(names) if said == "sidecar" else {}
        rows: list[Captioned] = []
        for name in names:
            repeats, words = folders.get(name.split("/")[0], (1, ""))
            captions = _words_of(name) if said == "file_name" else self._sidecar(name)
            captions = [words] if captions is None and words else captions
            if not captions:
                dropped[NO_CAPTION] += 1
                continue
            rows += [Captioned(name, caption, repeats) for caption in captions]
        facts: dict[str, object] = {"captions": said}
        if folders:
            facts["repeats"] = {folder: repeats for folder, (repeats, _) in folders.items()}
        return Found(rows, None, facts)

    def _sidecar(self, name: str) -> list[str] | None:
        """None where there is no such file in the folder; [] where it is empty, or no caption by its size."""
        for suffix in SIDECARS:
            beside = (self.root / name).with_suffix(suffix)
            if beside.is_file() and self.is_inside(beside):
                with open(beside, "rb") as file:
                    data = file.read(MAX_TEXT_BYTES + 1)
                lines = [] if len(data) > MAX_TEXT_BYTES else data.decode("utf-8-sig", errors="replace").splitlines()
                return [words for line in lines if (words := " ".join(line.split()))]
        return None


def _kohya(names: list[str]) -> dict[str, tuple[int, str]]:
    """{folder: (repeats, words)} where every image lies in a folder that kohya's rule names; {} for any other."""
    folders = {name.split("/")[0] for name in names if "/" in name}
    found = {folder: match for folder in folders if (match := KOHYA.fullmatch(folder))}
    if len(found) < len(folders) or any("/" not in name for name in names):
        return {}
    return {folder: (int(match[1]), " ".join(match[2].split())) for folder, match in sorted(found.items())}


def _words_of(name: str) -> list[str]:
    stem = PurePosixPath(name).stem
    words = " ".join(stem.replace("_", " ").replace("-", " ").split())
    return [words] if words else []


def _joined(base: str, name: str) -> str:
    """The path below the root of a name in a metadata file, which is one below that file's folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in (PurePosixPath(base) / path).parts if part != "."]
    return "/".join(parts)
