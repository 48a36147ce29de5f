"""Real trainings that are killed, and go on with the same workers or with others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from truth import relay_toy
from truth.toy_training import fingerprint

from raphael.base.checkpoint.folder import Stored
from raphael.base.checkpoint.home import CheckpointHome

ROOT = Path(__file__).parents[3]


def relay(folder, *attempts):
    """Returns how often something was killed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, relay_toy.__file__, str(folder), *attempts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "checkpoints"
    assert relay(folder, "ddp:1:0") == 0
    return CheckpointHome(folder).newest()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_one_world_wrote_any_other_goes_on_with(tmp_path, alone):
    """Shared out over 2, then over 3, whole with 1, over 2 again, whole with 2 (DDP), over 3, and to the end over 2."""
    worlds = ("fsdp2:2:36", "fsdp2:3:60", "ddp:1:84", "fsdp2:2:108", "ddp:2:156", "fsdp2:3:204", "fsdp2:2:0")
    assert relay(tmp_path / "c", *worlds) == len(worlds) - 1
    groups, meta = CheckpointHome(tmp_path / "c").newest()
    truth, truth_meta = alone
    for kind in ("model", "ema", "optimizer"):
        assert groups[kind].keys() == truth[kind].keys()
        for name, tensor in groups[kind].items():
            torch.testing.assert_close(tensor, truth[kind][name], rtol=0, atol=2e-5, msg=f"{kind} {name}")
    for point, expected in zip(meta["history"], truth_meta["history"], strict=True):
        assert point == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_worker_writes_its_own_share_and_no_more(tmp_path):
    assert relay(tmp_path / "c", "fsdp2:3:0") == 0
    stored = Stored(CheckpointHome(tmp_path / "c").all()[-1])
    sizes = [file.stat().st_size for file in sorted(stored.folder.glob("optimizer.*-of-00003.safetensors"))]
    assert len(sizes) == 3 and max(sizes) < 0.5 * sum(sizes)
    places = [part["at"][0] for part in stored.groups["ema"]["network.blocks.0.mix.weight"]["parts"]]
    assert places == [0, 11, 22]  # of 33 rows


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", ["ddp:1", "ddp:2", "fsdp2:2"])
def test_killed_at_random_moments_it_ends_in_the_bits_of_a_run_that_never_stopped(tmp_path, world):
    assert relay(tmp_path / "whole", f"{world}:0") == 0
    killed = relay(tmp_path / "killed", f"random:{world}:0")
    assert killed >= 3
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
