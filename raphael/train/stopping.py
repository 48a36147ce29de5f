"""Being asked to save and leave: by a signal, or, where signals do not reach, by somebody else in the process."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any, NoReturn

ASKED = threading.Event()  # a Ray worker trains in a thread; the thread that hears of its driver's stop sets this


class StopRequest:
    """Inside, SIGTERM and Ctrl-C are noted in `requested`; a second one ends at once, as outside.

    Signals reach only the main thread. Elsewhere `requested` follows ASKED alone.
    """

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.number) or ASKED.is_set()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.listen()
        return self

    def listen(self) -> None:
        """Once more, where a library may have put handlers of its own in the place of ours."""
        for number in self.before if not self.number else ():
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()

    def leave(self) -> NoReturn:
        """As if nobody had noted the signal. Raises KeyboardInterrupt or SystemExit(143)."""
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(143)
