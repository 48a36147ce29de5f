from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.serve.processes import Family, run_group
from raphael.base.ray_cluster import MARK

PROJECT = Path(__file__).resolve().parents[3]
SLEEPER = (
    "import subprocess, sys, time\n"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']{extra})\n"
)
TELL = "print(p.pid, flush=True); time.sleep({rest})"


def wait_until_gone(pid: int, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_status_and_words_of_the_program_come_back() -> None:
    said: list[str] = []
    status = run_group(
        [sys.executable, "-c", "print('hello'); raise SystemExit(3)"], Path.cwd(), {**os.environ}, said.append
    )
    assert status == 3
    assert "".join(said).strip() == "hello"


def test_what_a_finished_program_left_running_is_ended() -> None:
    said: list[str] = []
    code = SLEEPER.format(extra="") + TELL.format(rest=1.5)
    assert run_group([sys.executable, "-c", code], Path.cwd(), {**os.environ}, said.append) == 0
    assert wait_until_gone(int("".join(said)))


@pytest.mark.parametrize("extra", ["", ", start_new_session=True"], ids=["in the group", "in a session of its own"])
def test_an_interruption_ends_the_program_and_its_children(extra: str) -> None:
    said: list[str] = []
    code = SLEEPER.format(extra=extra) + TELL.format(rest=300)

    def stop(text: str) -> None:
        said.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_group([sys.executable, "-c", code], Path.cwd(), {**os.environ}, stop)
    assert wait_until_gone(int("".join(said)))


def test_a_program_that_ignores_sigterm_is_killed() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline()
    Family(process.pid).end(patience_s=0.5)
    assert process.wait(5) == -signal.SIGKILL


def test_processes_of_ray_are_left_to_their_driver_and_ended_when_it_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "said"
    program = (
        "import os, signal, subprocess, sys, time\n"
        "def say(text): print(text, file=open({file!r}, 'a'))\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep({pause}), say({words!r}), sys.exit(0)))\n"
    )
    ray = program.format(file=str(file), pause=0, words="ray ends") + "print('up', flush=True); time.sleep(300)"
    driver = program.format(file=str(file), pause=1, words="driver saved") + (
        f"subprocess.Popen([sys.executable, '-c', {ray!r}], env={{**os.environ, {MARK!r}: '1'}}); time.sleep(300)"
    )

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_group([sys.executable, "-c", driver], Path.cwd(), {**os.environ}, stop)
    assert file.read_text().split() == ["driver", "saved", "ray", "ends"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_one_who_waits_leaves_no_process_behind(number: int) -> None:
    inner = SLEEPER.format(extra="") + TELL.format(rest=300)
    outer = (
        "import os, sys; from pathlib import Path; from flows.serve.processes import run_group\n"
        "from raphael.base.stage import one_clear_line\n"
        f"inner = {inner!r}\n"
        "with one_clear_line('outer') as outcome:\n"
        "    say = lambda text: print(text, flush=True)\n"
        "    run_group([sys.executable, '-c', inner], Path.cwd(), {**os.environ}, say)\n"
        "sys.exit(outcome.status)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGINT else 143)
    assert wait_until_gone(child)
