"""`raphael edit`: every kind leaves its sheet, its images and what they were made by."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from truth.tiny_raphael import write_pipeline

from raphael.cli.main import main

SOURCE, TARGET = "a red circle on blue", "a red star on blue"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A picture of twice the model's size, and a mask of it."""
    home = tmp_path_factory.mktemp("picture")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(home / "picture.png")
    Image.fromarray(pixels[:32, :32]).save(home / "small.png")
    white = np.zeros((64, 64), np.uint8)
    white[16:40, 8:32] = 255
    Image.fromarray(white).save(home / "mask.png")
    return home


KINDS = {
    "switch": [SOURCE, "--then", TARGET, "--share", "0.5"],
    "image": ["{picture}/picture.png", TARGET, "--strength", "0.5"],
    "inpaint": ["{picture}/picture.png", TARGET, "--mask", "{picture}/mask.png"],
    "outpaint": ["{picture}/small.png", TARGET, "--margins", "0", "8", "0", "0"],
    "replace": [SOURCE, TARGET, "--blend", "circle", "star", "--cross-of", "star=0.2"],
    "refine": [SOURCE, "a big red circle on blue"],
    "reweight": [SOURCE, "--word", "red=2"],
    "paint": [SOURCE, "--region", "red circle={picture}/mask.png", "--weight", "1"],
    "vary": [SOURCE, "--strength", "0.5"],
    "interpolate": [SOURCE, "--to", TARGET, "--to-seed", "9"],
    "styles": [SOURCE, "--style", "pixel art", "--style", "an ink drawing of {{prompt}}"],
    "reconstruct": ["{picture}/picture.png", SOURCE],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_source_result_and_the_result_without_the_edit(folder, picture, tmp_path, capsys, kind):
    words = [word.format(picture=picture) for word in KINDS[kind]]
    command = ["edit", kind, *words, "--checkpoint", str(folder), "--steps", "2", "--num-images", "2"]
    assert main([*command, "--seed", "4", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split()
    assert [name.rpartition("/")[2] for name in printed] == [
        "sheet.png",
        *(f"{index:05d}-{name}.png" for name in ("source", "result", "without") for index in (0, 1)),
        "edit.json",
    ]
    facts = json.loads((tmp_path / "edit.json").read_text())
    assert facts["steps"] == 2 and facts["seed"] == 4 and facts["edit"]
    images = [np.asarray(Image.open(tmp_path / f"00001-{name}.png")) for name in ("source", "result", "without")]
    assert len({image.shape for image in images}) == 1
    assert not np.array_equal(images[0], images[1])


def test_a_grid_leaves_its_cells_and_one_sheet_and_draws_nothing_twice(folder, tmp_path, capsys):
    command = ["edit", "grid", SOURCE, "--checkpoint", str(folder), "--out", str(tmp_path)]
    command += ["--x", "steps=1,2", "--y", "seed=0-2", "--z", "replace=red|green"]
    assert main(command) == 0
    cells = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png") if "sheet" not in path.name}
    assert len(cells) >= 2 * 3 * 2 and capsys.readouterr().out.strip()
    assert main([*command, "--x", "steps=1,2"]) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in cells.items() if path.parent != tmp_path)


def test_maps_leaves_figures_and_arrays(folder, tmp_path, capsys):
    command = ["edit", "maps", SOURCE, "--checkpoint", str(folder), "--steps", "2", "--out", str(tmp_path)]
    assert main(command) == 0
    printed = capsys.readouterr().out.split()
    assert str(tmp_path / "words.png") in printed and str(tmp_path / "forming.webp") in printed
    assert json.loads((tmp_path / "inside.json").read_text())["shapes"]["x0"] == [2, 32, 32, 3]


def test_what_a_user_can_get_wrong_is_one_line(folder, picture, tmp_path, capsys):
    def said(*command):
        assert main(["edit", *command, "--checkpoint", str(folder), "--out", str(tmp_path / "x")]) == 1
        return capsys.readouterr().err

    assert "use refine" in said("replace", SOURCE, "a star")
    one, other = str(picture / "picture.png"), str(picture / "small.png")
    assert "--mask: got 32 x 32 px, expected the picture's 64 x 64" in said("inpaint", one, TARGET, "--mask", other)
    assert "strength: got 2" in said("image", one, TARGET, "--strength", "2")
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        main(["edit", "reweight", SOURCE, "--word", "red"])
    assert "got 'red', expected WORD=NUMBER such as red=2" in capsys.readouterr().err
