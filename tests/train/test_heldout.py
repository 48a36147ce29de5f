import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from truth.toy_training import LOOP, ToyData, ToyObjective

from raphael.base.stage import StageError
from raphael.train.distributed.world import World
from raphael.train.heldout import Heldout, Subset, chosen, split
from raphael.train.loop import Hooks, train

SHORT = replace(LOOP, num_images=96, log_every_images=32, checkpoint_every_images=48, heldout_every_images=40)


class Buckets(ToyData):
    """50 records, 30 of one shape and 20 of another. A batch of both is an error."""

    bucket_counts = (30, 20)

    def batch(self, indices):
        assert len({int(index) >= 30 for index in indices}) == 1
        return super().batch(indices)


def test_records_are_chosen_by_their_keys_alone():
    keys = [f"key{i}" for i in range(50)]
    out = chosen(keys, 7)
    ranked = sorted(keys, key=lambda key: hashlib.sha256(b"heldout/" + key.encode()).hexdigest())
    assert {keys[row] for row in out} == set(ranked[:7]) and (np.diff(out) > 0).all()
    assert {keys[::-1][row] for row in chosen(keys[::-1], 7)} == set(ranked[:7])
    assert {keys[row] for row in chosen(keys, 8)} > {keys[row] for row in out}
    with pytest.raises(StageError, match="num_heldout: got 50 of 50 records, expected at least one"):
        chosen(keys, 50)


def test_nothing_is_split_off_where_nothing_is_asked_for():
    data = ToyData()
    assert split(data, 0) == (data, None)


def test_every_record_is_on_one_side_with_its_bucket():
    data = Buckets()
    kept, out = split(data, 12)
    assert sorted([*kept.keys, *out.keys]) == data.keys and len(out) == 12
    for part in (kept, out):
        assert sum(part.bucket_counts) == len(part)
        assert part.bucket_counts[0] == sum(key < "key030" for key in part.keys)
        assert (part.batch(np.array([0]))["index"] == part.rows[0]).all()


def test_timesteps_are_strata_and_the_same_bits_come_twice():
    objective, out = ToyObjective().eval(), split(Buckets(), 20)[1]
    places, inner = [], objective.heldout
    objective.heldout = lambda batch, rng, place: places.append(place) or inner(batch, rng, place)
    measure = Heldout(objective, out, World(), "fp32")
    first, state = measure(), torch.random.get_rng_state()
    assert sorted(torch.cat(places).tolist()) == pytest.approx([(i + 0.5) / 80 for i in range(80)])
    assert measure() == first and torch.equal(torch.random.get_rng_state(), state)

    quarters = [first[f"denoise_t/{quarter}"] for quarter in range(4)]
    assert first["denoise"] == pytest.approx(sum(quarters) / 4)
    with torch.no_grad():
        objective.head.weight += 0.1
    assert measure() != first


def test_each_quarter_has_noise_of_its_own():
    objective, out = ToyObjective().eval(), split(ToyData(), 8)[1]
    noises, inner = [], objective.heldout
    objective.heldout = lambda batch, rng, place: noises.append(rng.normal("noise", (6,))) or inner(batch, rng, place)
    Heldout(objective, out, World(), "fp32")()
    flat = [tuple(row.tolist()) for noise in noises for row in noise]
    assert len(flat) == 4 * 8 and len(set(flat)) == len(flat)


@pytest.mark.parametrize("sharded", [False, True])
def test_any_number_of_workers_gives_the_same_bits(sharded):
    objective, out = ToyObjective().eval(), split(Buckets(), 20)[1]
    sums = []

    class Part(World):
        def sum(self, tensor):
            sums.append(tensor.clone())
            return tensor

    calls, inner = [], objective.heldout
    objective.heldout = lambda *arguments: calls.append(1) or inner(*arguments)
    fsdp2 = replace(World().parallel, strategy="fsdp2" if sharded else "ddp")
    counts = []
    for rank in range(3):
        Heldout(objective, out, Part(rank, 3, parallel=fsdp2), "fp32")()
        counts.append(len(calls) - sum(counts))
    Heldout(objective, out, Part(), "fp32")()
    assert torch.equal(sums[0] + sums[1] + sums[2], sums[3])
    assert len(set(counts)) == 1 or not sharded  # a forward with shared weights needs all ranks


def run(folder, loop, measured, stop=None):
    class Stop(Exception):
        pass

    def progress(images):
        if images == stop:
            raise Stop

    objective, (kept, out) = ToyObjective(), split(ToyData(), 9)
    heldout = Heldout(objective, out, World(), loop.precision) if measured else None
    logged = []

    class Tracker:
        def log(self, metrics, step):
            logged.extend((step, name) for name in metrics if name.startswith("heldout"))

    hooks = Hooks(heldout=heldout, progress=progress, say=lambda _: None)
    try:
        return objective, train(objective, kept, loop, 7, folder=folder, tracker=Tracker(), hooks=hooks), logged
    except Stop:
        return objective, None, logged


def test_measuring_changes_no_weight_and_is_there_for_raw_and_ema_weights(tmp_path):
    with_it, result, logged = run(tmp_path / "a", SHORT, True)
    without, plain, _ = run(tmp_path / "b", replace(SHORT, heldout_every_images=0), False)
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_it.state_dict()[name]), name
    for name, tensor in plain["ema"].items():
        assert torch.equal(tensor, result["ema"][name]), name
    assert plain["history"] == result["history"] and plain["heldout"] == []
    assert [point["images"] for point in result["heldout"]] == [0, 40, 80, 96]
    assert {step for step, _ in logged} == {0, 40, 80, 96} and (96, "heldout/ema/denoise_t/3") in logged
    first, last = result["heldout"][0], result["heldout"][-1]
    assert first["heldout/raw/denoise"] == first["heldout/ema/denoise"]
    assert last["heldout/raw/denoise"] != last["heldout/ema/denoise"]


def test_a_resumed_training_ends_with_the_same_held_out_losses(tmp_path):
    _, whole, _ = run(tmp_path / "a", SHORT, True)
    assert run(tmp_path / "b", SHORT, True, stop=88)[1] is None
    assert run(tmp_path / "b", SHORT, True)[1]["heldout"] == whole["heldout"]


def test_several_emas_that_start_late_follow_their_formula_through_a_resumption(tmp_path):
    """Against a loop over the weights after every step."""
    loop = replace(SHORT, ema_decay=0.9, ema_more_decays=(0.5,), ema_start_images=20, heldout_every_images=0)
    objective, weights = ToyObjective(), []
    kept = Subset(ToyData(), np.arange(40))
    hooks = Hooks(progress=lambda _: weights.append(objective.head.weight.detach().clone()), say=lambda _: None)
    result = train(objective, kept, loop, 7, folder=tmp_path / "a", hooks=hooks)
    for name, decay in (("ema", 0.9), ("ema_0.5", 0.5)):
        truth = weights[2]  # 24 images, the first step that ends at 20 or more
        for n, weight in enumerate(weights[3:], 1):
            d = min(decay, (1 + n) / (10 + n))
            truth = d * truth + (1 - d) * weight
        torch.testing.assert_close(result[name]["head.weight"], truth, rtol=1e-5, atol=1e-6)

    class Stop(Exception):
        pass

    def stop(images):
        if images == 64:
            raise Stop

    again = ToyObjective()
    with pytest.raises(Stop):
        train(again, kept, loop, 7, folder=tmp_path / "b", hooks=Hooks(progress=stop, say=lambda _: None))
    resumed = train(ToyObjective(), kept, loop, 7, folder=tmp_path / "b", hooks=Hooks(say=lambda _: None))
    done = train(ToyObjective(), kept, loop, 7, folder=tmp_path / "b", hooks=Hooks(say=lambda _: None))
    for name in ("ema", "ema_0.5"):
        assert torch.equal(resumed[name]["head.weight"], result[name]["head.weight"])
        assert torch.equal(done[name]["head.weight"], result[name]["head.weight"]), "a finished one is only read again"
