"""Features by several workers, one of them killed, or taken up again: the numbers of one undisturbed process."""

import numpy as np
import pytest
from PIL import Image
from truth import feature_jobs
from truth.feature_jobs import SPACE

from raphael.base.stage import StageError
from raphael.cli.main import main
from raphael.evaluate.features import workers
from raphael.evaluate.features.cache import BLOCK_ROWS, embed_folder
from raphael.evaluate.features.image_folder import ImageFolder, Preparation, read_prepared
from raphael.evaluate.features.workers import Work, embed_by_processes
from raphael.evaluate.metrics.kernels import kid
from raphael.evaluate.metrics.neighbours import density_coverage, precision_recall

PICTURES, REFERENCES = 2 * BLOCK_ROWS + 30, BLOCK_ROWS + 50
PREPARE = (Preparation("none", 0), 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("workers")
    for side, count, seed in (("a", PICTURES, 0), ("b", REFERENCES, 1)):
        (home / side).mkdir()
        rng = np.random.default_rng(seed)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256 - 20 * seed, (6, 6, 3), np.uint8)).save(
                home / side / f"{index:03d}.png"
            )
    return home


def work_of(home, name):
    cache = home / f"cache-{name}"
    cache.mkdir(exist_ok=True)
    return Work((), (ImageFolder.read(home / "a"), ImageFolder.read(home / "b")), PREPARE, cache)


def numbers(home, name):
    """Every metric from what is in a cache; what is missing there is computed."""
    work = work_of(home, name)
    ours, theirs = (embed_folder(folder, PREPARE, [SPACE], work.cache)[0] for folder in work.folders)
    drawn, real = ours.array(), theirs.array()
    distance = ours.statistics().distance(theirs.statistics())
    return distance, *kid(drawn, real, 10, 200), precision_recall(drawn, real), density_coverage(drawn, real)


@pytest.fixture(scope="module")
def undisturbed(home):
    return numbers(home, "one")


@pytest.fixture
def nothing_is_left(monkeypatch):
    """Where this is asked for, what workers have made must be all there is."""
    monkeypatch.setattr("raphael.evaluate.features.cache._embed_block", lambda *_: pytest.fail("a block was missing"))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_workers_give_the_numbers_of_one_process_to_the_last_digit(home, undisturbed, nothing_is_left, number):
    looks = []
    embed_by_processes(work_of(home, f"w{number}"), number, feature_jobs.embed, lambda: looks.append(1))
    assert looks and numbers(home, f"w{number}") == undisturbed
    assert undisturbed[0] > 0 and 0 < undisturbed[3]["precision"] < 1


def test_a_worker_that_is_killed_is_started_again_and_changes_nothing(home, undisturbed, nothing_is_left, capfd):
    embed_by_processes(work_of(home, "killed"), 2, feature_jobs.die_once)
    assert (home / "cache-killed" / "died").exists()
    assert "worker 0 of 2 died (exit code -9); what it finished stays" in capfd.readouterr().err
    assert numbers(home, "killed") == undisturbed


def test_a_run_that_was_killed_and_is_run_again_gives_the_same_and_keeps_what_was_done(home, undisturbed, monkeypatch):
    monkeypatch.setattr("raphael.base.cores.workers.ATTEMPTS", 1)
    with pytest.raises(StageError, match=r"worker 0 of 1 died 1 times .exit code -9; .*fewer --workers"):
        embed_by_processes(work_of(home, "resumed"), 1, feature_jobs.die_once)
    assert len(list((home / "cache-resumed").rglob("0*.npy"))) == 1
    read = []
    monkeypatch.setattr(
        "raphael.evaluate.features.image_folder.read_prepared",
        lambda path, *rest: read.append(path) or read_prepared(path, *rest),
    )
    assert numbers(home, "resumed") == undisturbed
    assert len(read) == PICTURES + REFERENCES - BLOCK_ROWS


def test_a_worker_that_dies_again_and_again_or_fails_ends_the_run_with_one_line(home):
    with pytest.raises(StageError, match="worker [01] of 2 died 3 times .exit code -9"):
        embed_by_processes(work_of(home, "dead"), 2, feature_jobs.die)
    with pytest.raises(StageError, match="^an image: not a whole image$"):
        embed_by_processes(work_of(home, "dead"), 2, feature_jobs.fail)


@pytest.mark.slow
def test_ray_gives_the_numbers_of_one_process_also_when_a_worker_dies(
    home, undisturbed, nothing_is_left, project, monkeypatch
):
    """Ray runs the task again whose worker is gone."""
    monkeypatch.setenv("PYTHONPATH", str(project / "tests"))  # its workers start elsewhere
    workers.embed_on_ray(work_of(home, "ray"), 2, feature_jobs.die_once)
    assert (home / "cache-ray" / "died").exists()
    assert numbers(home, "ray") == undisturbed


def evaluate(home, clip, name, *more):
    options = ["--features", str(clip), "--cache", str(home / f"cli-{name}"), "--params", str(home / "none")]
    sides = ["--images", str(home / "a"), "--reference", str(home / "b")]
    return main(["evaluate", *sides, *options, "--out", str(home / f"{name}.json"), *more])


def test_fewer_than_one_worker_is_an_error(home, capsys):
    assert evaluate(home, "nowhere", "none", "--workers", "0") == 1
    assert "--workers: got 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_the_same_report_with_two_workers(home, project, tmp_path):
    from dataclasses import replace

    import torch

    from raphael.base.config.params import load_config
    from raphael.encoders.clip import build_clip, save_clip

    config = load_config(project / "params.yaml").clip
    small = {"embed_dim": 16, "image_tower": "vit", "image_size_px": 32, "patch_size_px": 16}
    small |= {"image_width": 32, "image_layers": 1}
    small |= {"text_width": 32, "text_heads": 2, "text_layers": 1, "context_length": 16}
    torch.manual_seed(0)
    save_clip(build_clip(replace(config, **small)), tmp_path / "clip")
    assert evaluate(home, tmp_path / "clip", "alone") == 0
    assert evaluate(home, tmp_path / "clip", "shared", "--workers", "2") == 0
    assert (home / "shared.json").read_bytes() == (home / "alone.json").read_bytes()
