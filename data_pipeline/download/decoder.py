"""Foreign images are decoded here, in a process that may die: `python -m data_pipeline.download.decoder`.

What the gateway lets through is a whole image of a bearable size by its own header; what a decoder makes of the rest
nobody can know before. A GIF of 600 kB that clears its table with every code keeps OpenCV busy for 10 s, and a decoder
may have a hole. So img2dataset's resizer works in a child of its worker that has limits of memory and of
processor time. One image is in the child at a time: when the child dies, its image is known, and nothing has to be
searched or asked for again. The row ends as "decoder killed", and the next image gets a new child.

    worker (img2dataset) -- Guard: image in a file, its number in a pipe
      guardian  imports the decoder once, forks, tells of deaths; reads no image
        child   decodes, resizes, encodes; answers through the pipe

A child that the kernel killed (memory of the machine, not of the image) gets a second try, and so does an image
that had too little memory: an old child may have holes in its own. An image that spent its processor time does not.
"""

from __future__ import annotations

import dataclasses
import io
import json
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, BinaryIO

KILLED = "decoder killed"
TRIES = 2
_REQUEST = struct.Struct("<QQ")  # number, bytes
_ANSWER = struct.Struct("<QiiiiiQH200s")  # number, outcome, four sizes, bytes, length of the error, error
assert _ANSWER.size <= 512  # PIPE_BUF of POSIX: written atomically
_READY, _DONE = -1, 0  # other outcomes: the signal that ended the child, or 1000 and its exit status
_NO_MEMORY = 77  # exit status
_NO_MEMORY_WORDS = ("Insufficient memory", "Unable to allocate", "bad_alloc")
_DECODED = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


@dataclass(frozen=True)
class Limits:
    """Of decoding one image."""

    max_pixels: int  # OpenCV's own limit: it compares its own reading of the size before it takes memory
    memory_bytes: int  # beside what the process has when it starts
    processor_s: int
    hash_lists: tuple[str, ...] = ()  # of images that nobody may have: data_pipeline/common/hashes/lists.py
    hash_list_bits: int = 0


class GuardedResizer:
    """Stands in for img2dataset.resizer.Resizer: made with the same settings, called alike, the same answers.

    It travels to the workers with every shard; a worker's guard stays.
    """

    def __init__(self, limits: Limits, **settings: Any):
        self.limits, self.settings = limits, settings

    def __call__(self, img_stream: BinaryIO, blurring_bbox_list: None = None) -> _DECODED:
        """(encoded image, width, height, original width, original height, None), or five None and the error."""
        assert blurring_bbox_list is None, "no boxes are asked for"
        key = json.dumps([dataclasses.asdict(self.limits), self.settings])
        if key not in _guards:
            _guards[key] = Guard(self.limits, self.settings)
        img_stream.seek(0)
        return _guards[key].decode(img_stream.read())


_guards: dict[str, Guard] = {}  # of this process, by limits and settings


class Guard:
    """The worker's side: a guardian and its child, started when the first image comes."""

    def __init__(self, limits: Limits, settings: dict[str, Any]):
        self.limits, self.settings = limits, settings
        self.number = 0
        self.process: subprocess.Popen | None = None
        self.inbox, self.outbox = _memory_file(), _memory_file()

    def decode(self, image: bytes) -> _DECODED:
        """As GuardedResizer. Raises RuntimeError where no decoder starts."""
        for _ in range(TRIES):
            outcome, *sizes, num_bytes, error = self._ask(image)
            if outcome == _DONE:
                body = os.pread(self.outbox.fileno(), num_bytes, 0) if not error else None
                width, height, original_width, original_height = sizes if not error else [None] * 4
                return body, width, height, original_width, original_height, error or None
            if outcome == signal.SIGXCPU:
                break
        return None, None, None, None, None, f"{KILLED}: {_words(outcome)}"

    def close(self) -> int:
        """End the guardian and its child. Returns the guardian's exit status."""
        if self.process is None:
            return 0
        os.close(self.requests)
        os.close(self.answers)
        status = self.process.wait()
        self.process = None
        return status

    def _start(self) -> None:
        settings = json.dumps([dataclasses.asdict(self.limits), self.settings])
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        pipes = (requests, answers, self.inbox.fileno(), self.outbox.fileno())
        environment = {**os.environ, "OPENCV_IO_MAX_IMAGE_PIXELS": str(self.limits.max_pixels)}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.download.decoder", settings, str(os.getpid()), *map(str, pipes)],
                env=environment, stdin=subprocess.DEVNULL, pass_fds=pipes,
            )  # fmt: skip
        finally:
            os.close(requests)
            os.close(answers)
        if self._answer() is None:
            self.close()
            raise RuntimeError("the decoder did not start; its own words are above")

    def _ask(self, image: bytes) -> tuple:
        """(outcome, four sizes, bytes, error)."""
        if self.process is None:
            self._start()
        self.number += 1
        _write_file(self.inbox.fileno(), image)
        try:
            os.write(self.requests, _REQUEST.pack(self.number, len(image)))
            while answer := self._answer():
                if answer[0] == self.number:  # else the death of a child that had answered
                    return answer[1:]
        except BrokenPipeError:
            pass
        if self.close() >= 0:  # else the guardian was killed
            raise RuntimeError("the decoder does not run; its own words are above")
        return signal.SIGKILL, 0, 0, 0, 0, 0, ""

    def _answer(self) -> tuple | None:
        message = os.read(self.answers, _ANSWER.size)
        if len(message) < _ANSWER.size:
            return None
        *fields, length, error = _ANSWER.unpack(message)
        return *fields, error[:length].decode(errors="replace")


def _memory_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("image"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _words(outcome: int) -> str:
    if outcome == signal.SIGXCPU:
        return "too much processor time"
    if outcome == 1000 + _NO_MEMORY:
        return "too much memory"
    return signal.Signals(outcome).name if outcome < 1000 else f"status {outcome - 1000}"


def _write_file(file: int, body: bytes) -> None:
    """From the beginning. Raises OSError."""
    view, place = memoryview(body), 0
    while place < len(view):
        place += os.pwrite(file, view[place:], place)


def main() -> int:
    """The guardian: imports, then forks one child after the other until nobody asks any more."""
    limits, settings = json.loads(sys.argv[1])
    parent, requests, answers, inbox, outbox = map(int, sys.argv[2:])
    killed_with_parent(parent)
    resize = resizer(settings, Limits(**limits))
    taken = mmap.mmap(-1, 8)  # number of the image that a child took last, seen by both
    pipes = (requests, answers, inbox, outbox)
    os.write(answers, _ANSWER.pack(0, _READY, 0, 0, 0, 0, 0, 0, b""))
    idle_deaths = 0
    while idle_deaths < 3:
        before = taken[:]
        guardian, child = os.getpid(), os.fork()
        if not child:
            try:
                killed_with_parent(guardian)
                _serve(Limits(**limits), resize, taken, pipes)
            except MemoryError:
                os._exit(_NO_MEMORY)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return 0
        idle_deaths = idle_deaths + 1 if taken[:] == before else 0
        outcome = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 1000 + os.WEXITSTATUS(status)
        os.write(answers, _ANSWER.pack(int.from_bytes(taken[:], "little"), outcome, 0, 0, 0, 0, 0, 0, b""))
    return 1


def killed_with_parent(parent: int) -> None:
    """On Linux: this process is killed when `parent` (its process id) is gone. Starts no thread."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it had gone before the signal was asked for
        os._exit(1)


def resizer(settings: dict[str, Any], limits: Limits) -> Any:
    """img2dataset's own resizer, with right colours, which refuses what looks like an entry of a hash list.

    Its file alone is loaded: the package would bring pandas and fsspec.
    """
    import importlib.util

    from data_pipeline.common.hashes.lists import HashLists
    from data_pipeline.download.colours import CorrectedCv2

    (folder,) = importlib.util.find_spec("img2dataset").submodule_search_locations
    spec = importlib.util.spec_from_file_location("img2dataset_resizer", os.path.join(folder, "resizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lists = HashLists.read(limits.hash_lists) if limits.hash_lists else None
    module.cv2 = CorrectedCv2(module.cv2, limits.max_pixels, lists, limits.hash_list_bits)
    return module.Resizer(**settings)


def _serve(limits: Limits, resize: Any, taken: mmap.mmap, pipes: tuple[int, int, int, int]) -> None:
    """The child: one image after the other, until it dies or nobody asks."""
    requests, answers, inbox, outbox = pipes
    _limit_memory(limits.memory_bytes)
    while message := os.read(requests, _REQUEST.size):
        number, num_bytes = _REQUEST.unpack(message)
        taken[:] = number.to_bytes(8, "little")
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit_s = int(used.ru_utime + used.ru_stime) + 1 + limits.processor_s
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))  # past it: SIGXCPU, which kills
        body, *sizes, error = resize(io.BytesIO(os.pread(inbox, num_bytes, 0)))
        if error is not None and (not error or any(words in error for words in _NO_MEMORY_WORDS)):
            os._exit(_NO_MEMORY)  # MemoryError has no words
        if error is None:
            _write_file(outbox, body)
            answer = (*sizes, len(body), 0, b"")
        else:
            words = error.encode()[:200]
            answer = (0, 0, 0, 0, 0, len(words), words)
        os.write(answers, _ANSWER.pack(number, _DONE, *answer))


def _limit_memory(more_bytes: int) -> None:
    """At most so much address space beside what the process has now. Where the kernel has no such limit (macOS), the
    limit of pixels is the only one."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/statm") as file:
            has_bytes = int(file.read().split()[0]) * resource.getpagesize()
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where the machine runs out of memory, this process goes first, not the stage
    except OSError:
        return
    _, highest = resource.getrlimit(resource.RLIMIT_AS)
    most_bytes = has_bytes + more_bytes
    most_bytes = most_bytes if highest == resource.RLIM_INFINITY else min(most_bytes, highest)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, highest))


if __name__ == "__main__":
    raise SystemExit(main())
