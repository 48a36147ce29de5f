"""Somebody's images and as many of the model's own, as one folder with captions."""

from collections import Counter

import pytest
from PIL import Image
from truth.own_images import settings
from truth.tiny_raphael import write_pipeline

from data_pipeline.local_images.kinds import open_collection
from flows.finetuning.prior import join_prior, prompts_of
from raphael.base.stage import StageError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


def images(folder, count=3):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a thing {number}\nits other caption")
    return folder


def captions(folder):
    return {path.name: path.read_text() for path in folder.glob("*.txt")}


def test_half_of_the_images_are_the_models_own_with_the_prompts_in_turn(model, tmp_path):
    out = join_prior(model, images(tmp_path / "mine"), tmp_path / "joined", ("a circle", "a star"), "xyz")
    assert len(list(out.rglob("*.png"))) == 6
    assert captions(out / "own")["00001.txt"] == "xyz a thing 1\nxyz its other caption"
    assert captions(out / "prior") == {"00000.txt": "a circle", "00001.txt": "a star", "00002.txt": "a circle"}
    assert Image.open(out / "own/00002.png").getpixel((0, 0)) == (2, 0, 0)
    assert Image.open(out / "prior/00000.png").size == (32, 32)


def test_made_again_it_stays_and_with_another_image_it_is_made_anew(model, tmp_path):
    data = images(tmp_path / "mine", 2)
    out = join_prior(model, data, tmp_path / "joined", ("a circle",))
    before = (out / "prior/00000.png").stat().st_mtime_ns
    assert join_prior(model, data, tmp_path / "joined", ("a circle",)) == out
    assert (out / "prior/00000.png").stat().st_mtime_ns == before
    Image.new("RGB", (40, 40)).save(data / "9.png")
    (data / "9.txt").write_text("a new one")
    join_prior(model, data, tmp_path / "joined", ("a circle",))
    assert len(list((out / "prior").glob("*.png"))) == len(list((out / "own").glob("*.png"))) == 3


def test_what_cannot_be_joined_is_one_line(model, tmp_path):
    data = images(tmp_path / "mine", 1)
    (data / "0.txt").unlink()
    with pytest.raises(StageError, match="--prior: .*: got 0.png without one, expected images"):
        join_prior(model, data, tmp_path / "joined", ("a",))
    with pytest.raises(StageError, match="got no images"):
        join_prior(model, tmp_path / "empty", tmp_path / "joined", ("a",))
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined/notes").write_text("mine")
    with pytest.raises(StageError, match="holds something else"):
        join_prior(model, images(tmp_path / "more"), tmp_path / "joined", ("a",))
    assert (tmp_path / "joined/notes").read_text() == "mine"


def test_more_of_the_models_images_are_more_varied_and_still_half_of_an_epoch(model, project, tmp_path):
    mine = images(tmp_path / "mine")
    for file in mine.glob("*.txt"):
        file.write_text("a thing")
    out = join_prior(model, mine, tmp_path / "joined", ("a circle", "a star"), count=6)
    rows = open_collection(settings(project, "folder", out).source).find(Counter()).rows
    epoch = Counter({row.caption: 0 for row in rows})
    for row in rows:
        epoch[row.caption] += row.repeats
    assert epoch == {"a thing": 6, "a circle": 3, "a star": 3} and len(rows) == 9
    with pytest.raises(StageError, match="--prior-images: got 2, expected at least the 3"):
        join_prior(model, mine, tmp_path / "other", ("a circle",), count=2)


def test_prompts_may_stand_in_a_file_one_a_line(tmp_path):
    (tmp_path / "old.txt").write_text("a circle\n\n  a star \n")
    assert prompts_of(("a heart", str(tmp_path / "old.txt"))) == ("a heart", "a circle", "a star")
    with pytest.raises(StageError, match="--prior: .*none.txt: no such file, expected a prompt, or a .txt file"):
        prompts_of((str(tmp_path / "none.txt"),))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(StageError, match="got no prompt, expected one a line"):
        prompts_of((str(tmp_path / "empty.txt"),))
