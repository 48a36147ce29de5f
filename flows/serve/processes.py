"""Running a program as a process group of its own, so that nothing of it outlives the one who started it.

Neither a cancelled Prefect run nor a SIGTERM to `dvc repro` ends the programs below it; a group can be ended whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from select import select

from raphael.base.ray_cluster import MARK

TICK_S = 1.0
PATIENCE_S = 20.0  # from SIGTERM to SIGKILL: a training may want to write a checkpoint


@dataclass
class Family:
    """A process and all it ever started, also those that left its group or lost their parent (Ray's daemons do)."""

    leader: int
    members: dict[tuple[int, float], object] = field(default_factory=dict)

    def look(self) -> None:
        import psutil

        for pid in (self.leader, *(known for known, _ in list(self.members))):
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(pid).children(recursive=True):
                    self.members[child.pid, child.create_time()] = child

    def alive(self) -> list:
        """All of them that run, and whoever is in the leader's group."""
        import psutil

        living = []
        for member in self.members.values():
            with contextlib.suppress(psutil.Error):
                if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:  # is_running compares start times
                    living.append(member)
        return living + [process for process in _group(self.leader) if process not in living]

    def end(self, patience_s: float = PATIENCE_S) -> None:
        """SIGTERM to all but Ray's processes, and to these once they are alone; SIGKILL to whoever is left after a
        while. Returns when nobody is.

        A training that is asked to stop saves first, and needs its Ray for that; then it ends Ray itself.
        """
        import psutil

        asked = []
        try:
            deadline_s = time.monotonic() + patience_s
            while time.monotonic() < deadline_s:
                self.look()
                if not (alive := self.alive()):
                    break
                for process in [process for process in alive if not _is_rays(process)] or alive:
                    if process not in asked:
                        asked.append(process)
                        _send(process, signal.SIGTERM)
                time.sleep(0.2)
        finally:  # also when the user presses Ctrl-C again: then there is no more patience
            self.look()
            left = self.alive()
            for process in left:
                _send(process, signal.SIGKILL)
            # the leader's status is for the one who started it
            psutil.wait_procs([process for process in left if process.pid != self.leader], timeout=5)


def run_group(
    command: list[str],
    cwd: Path,
    env: dict[str, str],
    on_text: Callable[[str], None] = lambda text: None,
    on_tick: Callable[[], None] = lambda: None,
) -> int:
    """Run `command` in its own session and return its exit status; whatever ends this function ends the whole family.

    on_text: called with what the program writes (standard output and error together), as it comes.
    on_tick: called about once a second.
    The program sees a terminal where our standard error is one, so that its progress bars move.
    """
    read_end, write_end = _channel()
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=write_end, stderr=write_end, start_new_session=True
    )
    os.close(write_end)
    family = Family(process.pid)
    try:
        for text in _read(read_end, process):
            if text:
                on_text(text)
            else:
                family.look()
                on_tick()
        return process.wait()
    finally:
        family.end()
        process.wait()
        os.close(read_end)


def _read(read_end: int, process: subprocess.Popen) -> Iterator[str]:
    """What comes out, and an empty text about once a second, until the program has ended and said everything."""
    ticked_s = 0.0
    while True:
        ended = process.poll() is not None
        ready, _, _ = select([read_end], [], [], 0 if ended else TICK_S / 4)
        if ready:
            try:
                data = os.read(read_end, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # how a pseudo-terminal says that its other end is closed
                    raise
                data = b""
            if data:
                yield data.decode("utf-8", "replace")
            elif ended:
                return
            else:
                time.sleep(TICK_S / 4)  # closed its output, still runs
        elif ended:
            return
        if time.monotonic() - ticked_s >= TICK_S:
            ticked_s = time.monotonic()
            yield ""


def _channel() -> tuple[int, int]:
    if not sys.stderr.isatty():
        return os.pipe()
    import fcntl
    import pty
    import shutil
    import termios

    read_end, write_end = pty.openpty()
    size = shutil.get_terminal_size()
    fcntl.ioctl(write_end, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    return read_end, write_end


def _group(leader: int) -> list:
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _is_rays(process) -> bool:
    """Ray's own carry our mark; those that have changed their title have written it over their environment."""
    import psutil

    with contextlib.suppress(psutil.Error):
        return process.name().startswith("ray::") or MARK in process.environ()
    return False


def _send(process, number: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        process.send_signal(number)
