import threading
from dataclasses import replace

import pytest
import torch
from truth.toy_training import LOOP, ToyData, ToyObjective, fingerprint

from raphael.base.checkpoint.folder import CheckpointError
from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.checkpoint.parts import Share
from raphael.train.loop import Hooks, World, train
from raphael.train.saver import Saver

SHORT = replace(LOOP, num_images=192, checkpoint_every_images=48, heldout_every_images=48, sample_every_images=0)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Home:
    """Writes when it may; keeps what it was given then."""

    def __init__(self):
        self.may, self.saved = threading.Event(), {}

    def save(self, images, groups, meta, crew):
        assert self.may.wait(30)
        if meta.get("fail"):
            raise CheckpointError("no room")
        self.saved[images] = {name: value for name, value in groups["g"].items()}


def test_what_is_written_is_what_was_there_when_it_was_asked_for():
    home, tensor = Home(), torch.arange(6.0)
    with Saver(home, World()) as saver:
        saver.save(8, {"g": {"whole": tensor, "share": Share(tensor[2:4], (2,), (6,))}}, {})
        tensor += 1  # as the next step does
        assert not home.saved  # the loop goes on meanwhile
        home.may.set()
    assert torch.equal(home.saved[8]["whole"], torch.arange(6.0))
    assert torch.equal(home.saved[8]["share"].tensor, torch.tensor([2.0, 3.0])) and home.saved[8]["share"].at == (2,)


def test_one_is_written_at_a_time_and_leaving_waits_for_the_last():
    home = Home()
    timer = threading.Timer(0.2, home.may.set)
    with Saver(home, World()) as saver:
        saver.save(8, {"g": {}}, {})
        timer.start()
        saver.save(16, {"g": {}}, {})
        assert list(home.saved) == [8] or list(home.saved) == [8, 16]
    assert list(home.saved) == [8, 16]


def test_an_error_of_the_writing_reaches_the_loop_as_it_is():
    home = Home()
    with pytest.raises(CheckpointError, match="no room"), Saver(home, World()) as saver:
        saver.save(8, {"g": {}}, {"fail": True})
        saver.check()  # not known yet
        home.may.set()
        saver.thread.join()
        saver.check()
    with pytest.raises(CheckpointError, match="no room"), Saver(home, World()) as saver:
        saver.save(8, {"g": {}}, {"fail": True})  # known at the end
    with pytest.raises(KeyError), Saver(home, World()) as saver:  # what ended the loop is what a person reads
        saver.save(8, {"g": {}}, {"fail": True})
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "raphael-saver"]


def test_a_disk_slower_than_the_training_changes_no_bit(tmp_path, monkeypatch):
    train(ToyObjective(), ToyData(), LOOP, 7, folder=tmp_path / "fast", hooks=Hooks(say=str))
    seen, at = [0], {}
    real = CheckpointHome.save

    def slow(self, images, *rest):
        begun = seen[-1]
        while seen[-1] < min(begun + 40, LOOP.num_images):  # five steps later
            threading.Event().wait(0.001)
        at[images] = seen[-1]
        return real(self, images, *rest)

    monkeypatch.setattr(CheckpointHome, "save", slow)
    train(ToyObjective(), ToyData(), LOOP, 7, folder=tmp_path / "slow", hooks=Hooks(say=str, progress=seen.append))
    assert all(at[images] >= images + 40 for images in (96, 192, 288, 384)) and at[480] == 480
    assert fingerprint(tmp_path / "slow") == fingerprint(tmp_path / "fast")


class Known(ToyData):
    sha256 = "a" * 64


def test_the_best_by_the_held_out_loss_stays_and_says_so(tmp_path):
    """Scripted losses at 0, 48, 96, 144, 192 images: of the raw weights always 9, of the average the best at 48."""

    def run(folder, stop=0):
        calls = iter([9, 5, 9, 1, 9, 3, 9, 2, 9, 4][4 if stop < 0 else 0 :])  # resumed after the point at 48

        def progress(images):
            if images == stop:
                raise KeyError

        hooks = Hooks(
            say=str, heldout=lambda: {"denoise": float(next(calls))}, best_by="heldout/ema/denoise", progress=progress,
            about={"git_revision": "abc", "config": {"preset": "toy"}},
        )  # fmt: skip
        train(ToyObjective(), Known(), SHORT, 7, folder=folder, hooks=hooks)

    run(tmp_path / "whole")
    with pytest.raises(KeyError):
        run(tmp_path / "parts", 88)
    run(tmp_path / "parts", -1)
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        home = CheckpointHome(folder)
        assert [path.name for path in home.all()] == ["000000000048", "000000000144", "000000000192"]
        assert home.best() == {"checkpoint": "000000000048", "metric": "heldout/ema/denoise", "value": 1.0}
        meta = home.newest()[1]
        assert meta["score"] == {"metric": "heldout/ema/denoise", "value": 4.0}
        assert meta["about"] == {"git_revision": "abc", "config": {"preset": "toy"}}
        assert meta["facts"]["data_sha256"] == "a" * 64
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "parts")


def test_other_data_are_refused_by_their_hash(tmp_path):
    loop = replace(SHORT, num_images=48)
    train(ToyObjective(), Known(), loop, 7, folder=tmp_path, hooks=Hooks(say=str))
    other = Known()
    other.sha256 = "b" * 64
    with pytest.raises(CheckpointError, match="made with data_sha256 aaaa.*, this training has bbbb"):
        train(ToyObjective(), other, loop, 7, folder=tmp_path, hooks=Hooks(say=str))


def test_as_many_stay_as_the_settings_say(tmp_path):
    loop = replace(SHORT, keep_checkpoints=3)
    train(ToyObjective(), ToyData(), loop, 7, folder=tmp_path, hooks=Hooks(say=str))
    assert [path.name for path in CheckpointHome(tmp_path).all()] == ["000000000096", "000000000144", "000000000192"]
