import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from truth import parallel_toy
from truth.parallel_toy import RUNS, SHORT, BlockObjective
from truth.toy_training import LOOP, ToyData, ToyObjective, fingerprint

from raphael.base.checkpoint.home import CheckpointHome
from raphael.base.strict import ConfigError
from raphael.train.batches import Batches
from raphael.train.distributed.parallel import network_of
from raphael.train.distributed.world import PLAIN
from raphael.train.loop import Hooks, World, train

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def two_workers(folder, names, die_at=0):
    """Returns the exit status: 0, or of the first rank that failed, a signal as its number."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, parallel_toy.__file__, str(folder), names, str(die_at)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=550)
    assert done.returncode in (0, die_at and signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What two processes left behind: a folder of checkpoints for each of RUNS, and the images."""
    folder = tmp_path_factory.mktemp("pairs")
    two_workers(folder, ",".join(RUNS))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives with the settings of the run, and nothing shared or split: computed when asked for."""
    known = {}

    def of(name):
        loop = RUNS[name][0]
        if loop not in known:
            folder = tmp_path_factory.mktemp("alone")
            objective = BlockObjective()
            pictures = {}

            def draw(images, weights):
                pictures[images] = objective.network(torch.ones(2, 6), torch.arange(2)).detach()

            train(objective, ToyData(), loop, 7, folder=folder, hooks=Hooks(on_sample=draw, say=lambda _: None))
            known[loop] = (*CheckpointHome(folder).newest(), pictures)
        return known[loop]

    return of


def test_an_expert_is_idle_on_a_rank_and_on_no_whole_batch():
    """Otherwise the tests below would not see what an idle expert does."""
    everyone = Batches(7, len(ToyData()), SHORT.batch_size)
    one = Batches(7, len(ToyData()), SHORT.batch_size, 1, 2)
    steps = range(SHORT.num_images // SHORT.batch_size)
    kinds = [set(everyone.everyone(step)[1] % 2) for step in steps]
    assert all(found == {0, 1} for found in kinds)
    assert any(len(set(one.own(step)[1] % 2)) == 1 for step in steps)


@pytest.mark.parametrize("name", RUNS)
def test_two_workers_give_the_update_of_one(name, pairs, alone):
    groups, meta = CheckpointHome(pairs / name).newest()
    truth, truth_meta, truth_pictures = alone(name)
    # Muon's bf16 rounds of Newton and Schulz turn a difference in the last bit of the gradient into one of 1e-3
    coarse = name in ("ddp-muon", "fsdp2-muon", "fsdp2-bf16")
    tolerance = 2e-3 if coarse else 2e-5
    for kind in ("model", "ema", "optimizer"):
        assert groups[kind].keys() == truth[kind].keys()
        for key, tensor in groups[kind].items():
            assert tensor.dtype == truth[kind][key].dtype == torch.float32
            torch.testing.assert_close(tensor, truth[kind][key], rtol=0, atol=tolerance, msg=f"{kind} {key}")
    for point, expected in zip(meta["history"], truth_meta["history"], strict=True):
        assert point.keys() == expected.keys()
        for key, value in point.items():
            assert value == pytest.approx(expected[key], rel=3e-3 if coarse else 1e-5), key
    pictures = torch.load(pairs / f"{name}.pt", weights_only=True)
    assert list(pictures) == list(truth_pictures) == [0, 40, 80]
    for images, picture in pictures.items():
        torch.testing.assert_close(picture, truth_pictures[images], rtol=0, atol=tolerance)


def test_recomputed_blocks_change_no_bit(tmp_path, pairs):
    assert fingerprint(pairs / "fsdp2-recomputed") == fingerprint(pairs / "fsdp2")
    seen = {}
    for kind in ("none", "blocks"):
        objective = BlockObjective()
        world = World(parallel=replace(PLAIN, checkpoint_activations=kind))
        train(objective, ToyData(), replace(SHORT, sample_every_images=0), 7, folder=tmp_path / kind, world=world)
        seen[kind] = fingerprint(tmp_path / kind), [block.ran for block in objective.network.blocks]
    assert seen["none"][0] == seen["blocks"][0]
    assert seen["none"][1] == [10, 10] and seen["blocks"][1] == [20, 20]


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_passes_add_up_to_the_whole_batch(tmp_path, micro_batch):
    seen = {}
    for size in (0, micro_batch):
        objective = ToyObjective()
        loop = replace(LOOP, num_images=80)
        world = World(parallel=replace(PLAIN, micro_batch=size))
        result = train(objective, ToyData(), loop, 7, folder=tmp_path / str(size), world=world)
        seen[size] = objective, result["history"]
    (whole, history), (parts, parts_history) = seen[0], seen[micro_batch]
    assert parts.calls == whole.calls * -(-8 // min(micro_batch, 8))
    for name, tensor in whole.state_dict().items():
        if name != "calls":
            torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    for point, truth in zip(parts_history, history, strict=True):
        assert point == pytest.approx(truth, rel=1e-5)


@pytest.mark.slow
def test_raphael_shared_out_recomputed_and_in_passes_has_the_update_of_one_worker(tmp_path):
    """The U-Net with both mixtures, the edge heads, and time gates that the balance loss asks outside their blocks."""
    two_workers(tmp_path, "raphael")
    result, drawn = parallel_toy.run_denoising(tmp_path / "alone", PLAIN)
    (groups, meta), (truth, _) = (CheckpointHome(tmp_path / name).newest() for name in ("raphael", "alone"))
    assert meta["images_seen"] == 12
    for key, tensor in groups["model"].items():
        # AdamW's first steps are the sign of the gradient, at a rate up to 9e-4: a weight whose gradient is 0 but for
        # rounding may go either way, so nearly all are near and none is further than the three steps
        apart = (tensor - truth["model"][key]).abs()
        assert apart.max() < 4e-3 and (apart > 2e-5).float().mean() < 0.02, key
    for point, expected in zip(meta["history"], result["history"], strict=True):
        for name in ("loss", "denoise", "edge", "balance", "gradient_norm"):
            assert point[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], rel=1e-3), name
    pictures = torch.load(tmp_path / "raphael.pt", weights_only=True)
    assert list(pictures) == list(drawn) == [0, 4, 8, 12]
    for images, picture in pictures.items():
        torch.testing.assert_close(picture, drawn[images], rtol=0, atol=5e-3)


@pytest.mark.slow
def test_shared_weights_killed_and_resumed_end_in_the_same_bits(tmp_path, pairs):
    assert two_workers(tmp_path, "fsdp2", die_at=56) == signal.SIGKILL
    assert [path.name for path in CheckpointHome(tmp_path / "fsdp2").all()] == ["000000000040"]
    two_workers(tmp_path, "fsdp2")
    assert fingerprint(tmp_path / "fsdp2") == fingerprint(pairs / "fsdp2")


def test_what_two_workers_shared_goes_on_with_one(tmp_path, pairs, alone):
    """The file knows no number of workers."""
    (tmp_path / "fsdp2").mkdir()
    (pairs / "fsdp2" / "000000000040").rename(tmp_path / "fsdp2" / "000000000040")
    try:
        parallel_toy.run("fsdp2", tmp_path / "fsdp2")
    finally:
        (tmp_path / "fsdp2" / "000000000040").rename(pairs / "fsdp2" / "000000000040")
    groups, meta = CheckpointHome(tmp_path / "fsdp2").newest()
    assert meta["images_seen"] == 80
    for key, tensor in groups["ema"].items():
        torch.testing.assert_close(tensor, alone("fsdp2")[0]["ema"][key], rtol=0, atol=2e-5, msg=key)


@pytest.mark.parametrize("key", ["checkpoint_activations", "compile"])
def test_a_network_without_blocks_is_refused(tmp_path, key):
    world = World(parallel=replace(PLAIN, **{key: "blocks"}))
    with pytest.raises(ConfigError, match=f"parallel.{key}: got blocks, but ToyObjective has no network"):
        train(ToyObjective(), ToyData(), LOOP, 7, folder=tmp_path, world=world)


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("muon", 1)])
def test_the_first_line_says_what_is_on_and_counts_the_bytes(tmp_path, optimizer, moments):
    class Wide(ToyObjective):
        def __init__(self):
            super().__init__()
            self.wide = torch.nn.Linear(1024, 1024, bias=False)

    said = []
    world = World(parallel=replace(PLAIN, micro_batch=3))
    loop = replace(SHORT, optimizer=optimizer, num_images=8, sample_every_images=0)
    train(Wide(), ToyData(), loop, 7, folder=tmp_path, world=world, hooks=Hooks(say=said.append))
    assert said == [
        f"1 worker on cpu, precision fp32, batch 8 (8 a worker, 3 passes), {optimizer}; weights 4.0 + gradients 4.0 + "
        f"optimizer {4 * moments}.0 + EMA 4.0 = {12 + 4 * moments}.0 MiB a worker, activations beside; "
        f"{8 + 4 * moments}.0 MiB of main memory while a checkpoint is written"
    ]


def test_the_network_is_what_holds_all_that_is_trained():
    objective = BlockObjective()
    assert network_of(objective) is objective.network
    toy = ToyObjective()
    assert network_of(toy) is toy


@pytest.mark.slow
def test_compiled_blocks_give_the_same_update(tmp_path):
    world = World(parallel=replace(PLAIN, compile="blocks"))
    loop = replace(SHORT, sample_every_images=0)
    compiled, plain = BlockObjective(), BlockObjective()
    train(plain, ToyData(), loop, 7, folder=tmp_path / "plain")
    try:
        train(compiled, ToyData(), loop, 7, folder=tmp_path / "compiled", world=world)
    except Exception as error:
        if "compiler" in str(error).lower() or "Python.h" in str(error):
            pytest.skip(f"torch.compile finds no compiler here: {str(error).splitlines()[0][:100]}")
        raise
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor, rtol=0, atol=2e-5, msg=name)
