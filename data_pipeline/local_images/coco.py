"""COCO: captions_train2017*.json beside a folder of its images, and the same of val2017, whose captions are prompts."""

from __future__ import annotations

import json
import operator
from collections import Counter
from pathlib import Path

from data_pipeline.common.addresses import one_line
from data_pipeline.local_images.collection import NOT_HERE, Captioned, Found
from data_pipeline.local_images.files import ImageFiles
from raphael.base.stage import StageError


class Coco(ImageFiles):
    expected = "captions_train2017*.json beside a folder train2017/ of the images that it names"

    def find(self, dropped: Counter[str]) -> Found:
        """Rows: one per (image, caption) of train2017. Held out: the first caption of each val2017 image."""
        train = _captions(self.root, "train2017", required=True)
        rows = [Captioned(name, text) for name, text, present in train if present]
        dropped[NOT_HERE] += len(train) - len(rows)
        heldout: dict[str, str] = {}
        for name, text, present in _captions(self.root, "val2017", required=False):
            if present:
                heldout.setdefault(name, text)
        return Found(rows, [(text, name) for name, text in heldout.items()], {})


def _captions(root: Path, split: str, required: bool) -> list[tuple[str, str, bool]]:
    """(path below root, caption, is the image there) of every caption of a split, by image and annotation id."""
    files = sorted(root.glob(f"captions_{split}*.json")) or sorted(
        (root / "annotations").glob(f"captions_{split}*.json")
    )
    if not files and required:
        raise StageError(f"{root}: got no captions_{split}*.json, expected COCO's caption file there; set source.path")
    captions: dict[int, tuple[str, int, str]] = {}
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            names = {image["id"]: image["file_name"] for image in data["images"]}
            for item in data["annotations"]:
                number = operator.index(item["id"])  # TypeError for what cannot be put in order
                words = " ".join(item["caption"].split())
                captions[number] = (f"{split}/{names[item['image_id']]}", number, words)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StageError(
                f"{file}: not COCO caption JSON ({type(error).__name__}: {one_line(error)}); expected images and "
                "annotations"
            ) from None
    present = {f"{split}/{path.name}" for path in (root / split).glob("*")}
    return [(name, text, name in present) for name, _, text in sorted(captions.values())]
