"""kill -9 at random moments, then the same command again: not one bit differs (truth/kill_points.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from truth import kill_points

ROOT = Path(__file__).parents[2]


def killed(folder, kind, count, seed):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, kill_points.__file__, str(folder), kind, str(count), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == count and found["trainings"] == found["same"] and found["differing_bits"] == 0, found
    return found


def test_five_random_kill_points_change_no_bit(tmp_path):
    killed(tmp_path, "bare", 5, seed=0)


def test_differing_bits_are_counted(tmp_path):
    for name, weights, more in (("one", [0b0000, 0b1111], b""), ("other", [0b0001, 0b1001], b"ab")):
        for images in ("000000000008", "000000000016"):
            (tmp_path / name / images).mkdir(parents=True)
            (tmp_path / name / images / "weights").write_bytes(np.array(weights, np.uint8).tobytes() + more)
    assert kill_points.differing_bits(tmp_path / "one", tmp_path / "one") == 0
    assert kill_points.differing_bits(tmp_path / "one", tmp_path / "other") == 1 + 2 + 16
    (tmp_path / "other/000000000016/alone").write_bytes(b"abc")
    assert kill_points.differing_bits(tmp_path / "one", tmp_path / "other") == 1 + 2 + 16 + 24
    (tmp_path / "other/000000000024").mkdir()
    with pytest.raises(RuntimeError, match="got checkpoints at 000000000016 and 000000000024"):
        kill_points.differing_bits(tmp_path / "one", tmp_path / "other")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("kind", "count"), [("bare", 200), ("ddp", 10), ("fsdp2", 10), ("ray", 10)])
def test_many_random_kill_points_change_no_bit(tmp_path, kind, count):
    found = killed(tmp_path, kind, count, seed=1)
    assert len(found["resumed_from_images"]) > 1  # not all at the same place
