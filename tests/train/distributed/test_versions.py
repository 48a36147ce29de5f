import os
import subprocess
import sys
from pathlib import Path

import torch
from truth import versions_toy

from raphael.train.distributed import versions
from raphael.train.distributed.versions import check_versions, difference, own_versions
from raphael.train.distributed.world import World

ROOT = Path(__file__).parents[3]
SAME = {"host": "a", "torch": "2.15.0", "python": "3.11.2"}


def test_a_worker_alone_has_nobody_to_differ_from(monkeypatch):
    monkeypatch.setattr(versions, "own_versions", None)
    check_versions(World())


def test_the_same_on_every_host_is_no_difference():
    assert difference([SAME, {**SAME, "host": "b"}]) == ""


def test_what_differs_is_named_with_ranks_and_hosts():
    other = {**SAME, "host": "b", "torch": "2.14.1"}
    line = difference([SAME, other, SAME, other])
    assert "got torch 2.15.0 on workers 0, 2 (a), 2.14.1 on workers 1, 3 (b), expected one version of each" in line
    assert "python" not in line and "\n" not in line and "the same command then resumes" in line


def test_many_workers_are_counted_and_what_one_does_not_have_differs():
    line = difference([SAME] * 20 + [{"host": "b", "torch": "2.15.0"}])
    assert "python 3.11.2 on workers 0, 1, 2, 3, 4, 5, 6, 7 and 12 more (a), none on worker 20 (b)" in line


def test_the_sources_are_part_of_it(monkeypatch, tmp_path):
    before = own_versions()
    assert before["torch"] == torch.__version__ and len(before["raphael's sources"]) == 12
    (tmp_path / "raphael/train/distributed").mkdir(parents=True)
    (tmp_path / "raphael/train/distributed/versions.py").write_text("1")
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "raphael/train/distributed/versions.py"))
    one = own_versions()
    (tmp_path / "raphael/train/distributed/versions.py").write_text("2")
    two = own_versions()
    assert len({before["raphael's sources"], one["raphael's sources"], two["raphael's sources"]}) == 3


def test_two_workers_of_which_one_has_another_torch_both_say_so(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, versions_toy.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = {(tmp_path / str(rank)).read_text() for rank in (0, 1)}
    assert f"torch {torch.__version__} on worker 0 (" in line and "2.14.1 on worker 1 (" in line
