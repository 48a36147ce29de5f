"""Two pairs of folders of photographs under pair-debug/v1, number by number beside other programs and loops."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--n", "40", "--without-inception"), ("--n", "10")])
def test_every_number_of_two_pairs_of_photographs_is_within_its_limit(shared_data, project, more):
    """benchmarks/coco_pairs.py ends with 1 where one is off; the kept result is of all photographs."""
    assert (shared_data / "coco" / "val2017").is_dir()
    environment = {**os.environ, "PYTHONPATH": str(project)}
    command = [sys.executable, "benchmarks/coco_pairs.py", *more]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"{26 if 'inception' in more[-1] else 54} numbers, 0 off their limit"
