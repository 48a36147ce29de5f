"""The order of learning: which samples and timesteps the first images are, and that nothing else depends on it."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from truth.toy_training import LOOP, ToyData, ToyObjective

from flows.workspace import settings
from raphael.base.checkpoint.parts import CheckpointError
from raphael.base.config.params import PhaseConfig, load_config
from raphael.base.config.preset import load_preset
from raphael.base.records import CAPTIONS as CAPTIONS_FILE
from raphael.base.records import PHASE
from raphael.base.stage import StageError, write_json
from raphael.base.strict import ConfigError
from raphael.diffusion.schedule import Schedule
from raphael.objectives.denoising import DenoisingObjective
from raphael.train.batches import Batches
from raphael.train.heldout import Subset
from raphael.train.loop import Hooks, train
from raphael.train.optim.optimizer import learning_rate
from raphael.train.phases import Phased, in_phases

COUNT = 50
CAPTIONS = [
    f"a {'red' if i % 5 == 0 else 'blue'} circle {'Left of' if i % 2 else 'and'} a square" for i in range(COUNT)
]
PHASES = (
    PhaseConfig(until_images=96, timesteps=(0.9, 1.0), captions=r"\bleft of\b"),
    PhaseConfig(until_images=160, captions="red|green"),
)


def phased(phases=PHASES, data=None):
    return Phased(data or ToyData(COUNT), phases, CAPTIONS)


def sequence(batches, first, last):
    return [
        pair
        for step in range(first, last)
        for pair in zip(*map(np.ndarray.tolist, batches.everyone(step)), strict=True)
    ]


def test_a_phase_draws_its_own_records_each_once_an_epoch_and_then_all_come():
    batches = phased().batches(seed=7, batch_size=8)
    left = [i for i in range(COUNT) if i % 2]
    first = sequence(batches, 0, 12)
    assert sorted(index for epoch, index in first if epoch == 0) == left  # phase 0: numbers are those of the records
    assert {index for _, index in first} == set(left)
    assert {index - COUNT for _, index in sequence(batches, 12, 20)} == set(range(0, COUNT, 5))
    last = sequence(batches, 20, 20 + 25)
    assert sorted(index - 2 * COUNT for epoch, index in last if epoch == 0) == list(range(COUNT))


def test_a_numbered_sample_is_its_record_with_its_phase():
    data = phased()
    batch = data.batch(np.array([3, COUNT + 3, 2 * COUNT + 4]))
    assert batch["index"].tolist() == [3, 3, 4] and batch[PHASE].tolist() == [0, 1, 2]
    assert data.keys[COUNT + 3] == "key003"


def test_randomness_is_anothers_in_every_phase_and_the_same_whenever_asked():
    one, other = phased().batches(7, 8), phased().batches(7, 8)
    numbers = [set(one.everyone(step)[1].tolist()) for step in (0, 12, 20)]
    assert not numbers[0] & numbers[1] and not numbers[1] & numbers[2]  # so noise is never drawn twice
    sequence(other, 0, 30)
    np.testing.assert_array_equal(one.everyone(17), other.everyone(17))


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_side_by_side_are_the_batch_of_one_worker(size):
    whole, ranks = phased().batches(0, 8), [phased().batches(0, 8, rank, size) for rank in range(size)]
    for step in (0, 11, 12, 19, 20, 40):
        np.testing.assert_array_equal(np.concatenate([rank.own(step) for rank in ranks], axis=1), whole.everyone(step))


def test_batches_of_a_phase_are_of_one_bucket():
    class Bucketed(ToyData):
        bucket_counts = (20, 0, 30)

    batches = phased(data=Bucketed(COUNT)).batches(0, 4)
    bucket = np.repeat([0, 2], [20, 30])
    for step in range(60):
        assert len(set(bucket[batches.everyone(step)[1] % COUNT])) == 1


def test_after_phases_of_no_image_the_order_is_that_of_no_phases_shifted_by_nothing():
    plain, late = Batches(3, COUNT, 8), phased(()).batches(3, 8)
    assert sequence(plain, 0, 20) == sequence(late, 0, 20)


def test_records_kept_out_of_training_stay_out_of_its_phases():
    rows = np.arange(0, COUNT, 3)
    data = Phased(Subset(ToyData(COUNT), rows), PHASES, [CAPTIONS[row] for row in rows])
    seen = {index for step in range(40) for index in data.batch(data.batches(0, 8).everyone(step)[1])["index"].tolist()}
    assert seen == set(rows.tolist())


class Noting(ToyObjective):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch, rng):
        self.seen.append((batch[PHASE].tolist(), batch["index"].tolist(), rng.normal("noise", (1,)).flatten().tolist()))
        return super().forward(batch, rng)


def run(folder, phases=PHASES, until=0):
    def progress(images):
        if images == until:
            raise KeyboardInterrupt

    torch.set_num_threads(1)
    objective = Noting()
    result = None
    try:
        hooks = Hooks(progress=progress, say=lambda line: None)
        result = train(objective, phased(phases), LOOP, 7, folder=folder / "checkpoints", hooks=hooks)
    except KeyboardInterrupt:
        pass
    return objective, result


def digest(folder):
    newest = sorted((Path(folder) / "checkpoints").glob("[0-9]*"))[-1]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.iterdir()}


def test_stopped_on_either_side_of_a_border_and_resumed_is_the_same_to_the_last_bit(tmp_path):
    """Checkpoints lie at 96, the border itself, and at 192; stopped at 104 eight images are done again."""
    whole, _ = run(tmp_path / "whole")
    assert [phase for phases, _, _ in whole.seen for phase in set(phases)] == [0] * 12 + [1] * 8 + [2] * 40
    for stopped in (88, 96, 104, 160, 168):
        folder = tmp_path / str(stopped)
        run(folder, until=stopped)
        again, _ = run(folder)
        assert digest(folder) == digest(tmp_path / "whole")
        assert again.seen == whole.seen[-len(again.seen) :]


def test_a_checkpoint_of_another_order_is_refused(tmp_path):
    run(tmp_path, until=104)
    with pytest.raises(CheckpointError, match="data_sha256"):
        run(tmp_path, phases=(replace(PHASES[0], until_images=88), PHASES[1]))


def test_captions_are_those_beside_the_records_by_key(tmp_path):
    data = Subset(ToyData(COUNT), np.array([1, 4, 7]))
    assert in_phases(data, (), tmp_path) is data  # nothing is read where there are no phases
    write_json(tmp_path / CAPTIONS_FILE, dict(zip(ToyData(COUNT).keys, CAPTIONS, strict=True)))
    found = in_phases(data, PHASES[:1], tmp_path)
    assert [rows.tolist() for rows in found.rows] == [[0, 2], [0, 1, 2]]  # places in the subset
    assert found.describe() == ["phase 0, images 0 to 96: 2 of 3 records, timesteps 0.9 to 1 of T"]


def test_a_phase_without_a_record_is_refused_with_its_name():
    with pytest.raises(
        StageError, match=r"train.settings.phases\[1\].captions: got 'violet', which is found in none of 50"
    ):
        phased((PHASES[0], PhaseConfig(until_images=160, captions="violet")))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"until_images": 100}, "settings.phases: got until_images .*multiples of train.loop.batch_size 16"),
        ({"timesteps": [0.5, 0.5]}, "timesteps: got .*the lower first"),
        ({"captions": "("}, "captions: got '\\(', expected a regular expression"),
    ],
)
def test_phases_that_mean_nothing_are_refused(project, tmp_path, changes, line):
    params = Path(shutil.copy(project / "params.yaml", tmp_path))
    with pytest.raises(ConfigError, match=line):
        settings.apply(params, {"train.settings.phases": [{"until_images": 160, **changes}]})
    with pytest.raises(ConfigError, match="phases: got until_images"):
        settings.apply(params, {"train.settings.phases": [{"until_images": 160}, {"until_images": 160}]})


def test_a_phase_has_its_timesteps_and_after_it_the_trainings_hold(project):
    config = load_config(project / "params.yaml").training()
    goal = object.__new__(DenoisingObjective)
    torch.nn.Module.__init__(goal)
    goal.config = replace(config, phases=(PhaseConfig(until_images=160, timesteps=(0.9, 1.0)),), timestep_shift=3.0)
    goal.schedule = Schedule(load_preset("tiny").diffusion)
    u = torch.linspace(0, 1, 1001)[:-1]
    inside = goal._timesteps(u, torch.zeros(1000, dtype=torch.int64))
    assert inside.min() == 900 and inside.max() == 999
    assert torch.bincount(inside)[900:].float().sub(10).abs().max() <= 1  # uniform within
    after = goal._timesteps(u, torch.ones(1000, dtype=torch.int64))
    assert torch.equal(after, goal._timesteps(u, None))  # the same timesteps as without any phase
    assert torch.equal(after, (3 * u / (1 + 2 * u) * 1000).long())


# ---- the trapezoid: whose end may be decided later ----------------------------------------------------------------

TRAPEZOID = replace(LOOP, schedule="trapezoid", decay_images=160)


def test_a_trapezoid_is_constant_and_then_a_cosine_down_to_zero():
    rates = [learning_rate(images, TRAPEZOID) / LOOP.learning_rate for images in (20, 40, 320, 400, 480)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0], abs=1e-9)
    for changes in ({"schedule": "cosine"}, {"decay_images": 0}, {"decay_images": 481}):
        with pytest.raises(ValueError, match="decay_images: got"):
            replace(TRAPEZOID, **changes)


@pytest.mark.parametrize(("total", "decay"), [(640, 160), (400, 80), (480, 240)])
def test_moving_the_fall_before_it_begins_is_what_one_run_does(tmp_path, total, decay):
    moved = replace(TRAPEZOID, num_images=total, decay_images=decay)

    def go(folder, loop, until=0):
        def progress(images):
            if images == until:
                raise KeyboardInterrupt

        try:
            train(ToyObjective(), ToyData(), loop, 7, folder=folder / "checkpoints", hooks=Hooks(progress=progress))
        except KeyboardInterrupt:
            pass

    go(tmp_path / "one", moved)
    go(tmp_path / "two", TRAPEZOID, until=240)
    go(tmp_path / "two", moved)
    one, two = (torch.cat([value.flatten() for value in weights(tmp_path / name).values()]) for name in ("one", "two"))
    assert torch.equal(one, two)


def weights(folder):
    from raphael.base.checkpoint.home import CheckpointHome

    groups, meta = CheckpointHome(folder / "checkpoints").newest()
    return groups["model"]


def test_a_fall_that_has_begun_is_not_moved(tmp_path):
    def progress(images):
        if images == 400:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(ToyObjective(), ToyData(), TRAPEZOID, 7, folder=tmp_path, hooks=Hooks(progress=progress))
    for total in (640, 400):
        loop = replace(TRAPEZOID, num_images=total)
        with pytest.raises(CheckpointError, match="after 384 images of a rate that falls from 320 on"):
            train(ToyObjective(), ToyData(), loop, 7, folder=tmp_path)
