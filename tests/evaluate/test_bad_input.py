"""What evaluation is given wrong, beyond test_folders.py: lists that do not match, mixed sizes, others' statistics."""

import json

import numpy as np
import pytest
from PIL import Image

from raphael.base.stage import StageError
from raphael.evaluate.features.cache import embed_folder
from raphael.evaluate.features.extract import FeatureSpace
from raphael.evaluate.features.image_folder import ImageFolder, Preparation
from raphael.evaluate.metrics.frechet import Features
from raphael.evaluate.protocols.folders import _prompts


def draw(folder, sizes):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return ImageFolder.read(folder)


def corners(name="fd_corners"):
    """Features that depend on how an image was cropped: its four corners."""
    return FeatureSpace(name, lambda batch: batch[:, ::7, ::7].reshape(len(batch), -1)[:, :12], name.ljust(16, "0"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "one\ntwo", "got 2 prompts for 3 images, expected as many"),
        ("p.txt", "one\ntwo\nthree\nfour", "got 4 prompts for 3 images"),
        ("p.json", json.dumps({"prompts": [{"prompt": "one"}]}), "got 1 prompts for 3 images"),
        ("p.json", json.dumps({"captions": []}), "expected prompts: "),
        ("p.json", json.dumps({"prompts": [{"text": "one"}] * 3}), "expected prompts: "),
        ("p.json", "{", "not valid JSON"),
        ("p.txt", None, "no such file; expected one prompt a line"),
    ],
)
def test_a_caption_list_that_does_not_match_the_images_is_an_error_that_says_both_numbers(tmp_path, name, text, says):
    drawn = draw(tmp_path / "a", [(8, 8)] * 3)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(StageError, match=says):
        _prompts(drawn, tmp_path / name)


def test_images_of_mixed_sizes_that_nothing_prepares_are_an_error_that_says_what_to_do(tmp_path):
    drawn = draw(tmp_path / "a", [(16, 16), (16, 12)])
    with pytest.raises(StageError, match=r"got images of .16, 16, 3. and .12, 16, 3., .*take a protocol that"):
        embed_folder(drawn, (Preparation("none", 0), 0), [corners()], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_features_of_another_protocols_preparation_or_of_another_network_are_never_taken(tmp_path):
    drawn = draw(tmp_path / "a", [(40, 30), (30, 40)])
    settings = [("centre", 16), ("centre", 24), ("none", 16)]
    sets = [embed_folder(drawn, (Preparation(*one), 0), [corners()], tmp_path / "cache")[0] for one in settings]
    sets += embed_folder(drawn, (Preparation("centre", 16), 0), [corners("fd_other")], tmp_path / "cache")
    assert len({one.folder for one in sets}) == 4
    assert not np.array_equal(sets[0].array(), sets[2].array())


def test_statistics_of_another_network_are_refused():
    rng = np.random.default_rng(0)
    ours, theirs = Features(3).update(rng.normal(size=(9, 3))), Features(4).update(rng.normal(size=(9, 4)))
    with pytest.raises(ValueError, match="got features of 3 and 4 dimensions, expected the same feature network"):
        ours.distance(theirs)


@pytest.mark.parametrize("spoil", ["short", "garbage", "gone"])
def test_a_block_of_statistics_that_is_not_whole_is_an_error_that_names_it(tmp_path, spoil):
    drawn = draw(tmp_path / "a", [(16, 16)] * 3)
    (cached,) = embed_folder(drawn, (Preparation("none", 0), 0), [corners()], tmp_path / "cache")
    if spoil == "short":
        np.save(cached.path(0), cached.array()[:2])
    elif spoil == "garbage":
        cached.path(0).write_bytes(b"half a block")
    else:
        cached.path(0).unlink()
    with pytest.raises(StageError, match=r"00000.npy: (got \(2, 12\), expected 3 rows|not a block of features)"):
        cached.array()
