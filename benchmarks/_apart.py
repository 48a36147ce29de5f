"""A measurement in a process of its own, for its peak memory."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """function(*arguments) -> a dict, to which "peak_gb" of resident memory is added. Exits where the process fails.

    Linux lets a new process start from the peak of the one that made it: whoever asks must itself stay small.
    """
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.SimpleQueue()
    process = spawn.Process(target=_answer, args=(answers, function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{arguments} ended with status {process.exitcode}")
    return answers.get()


def here(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The same in this process: quicker, and the memory is the peak of all that it did so far."""
    answer = function(*arguments)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak_gb": round(peak_gb, 3), **answer}


def _answer(answers: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    answers.put(here(function, *arguments))
