"""What arrives on a connection, counted: a hostile server's cheapest attack is on our processor, not on our line.

http.client reads interim answers (`100 Continue`), chunk sizes and trailers for as long as they come, some microseconds
each, a few bytes each: a core for the whole deadline. So every byte counts against an allowance that grows with the
image alone, and so does every time that we are woken for some bytes.
"""

from __future__ import annotations

import io
import socket
from collections.abc import Callable

PIECE_BYTES = 1 << 16
AROUND_BYTES = 1 << 18  # headers, chunk sizes, trailers; http.client itself takes 100 headers of 64 KiB
SHARE_AROUND = 8  # chunk sizes may be an eighth of the image: chunks of 64 bytes
FREE_READS = 20_000
BYTES_A_READ = 64  # beyond FREE_READS on the average; a TCP segment has 536 at least


class TooMuchAround(Exception):
    """More bytes or more pieces than an image of this size can need."""


class CountedSocket:
    """What http.client needs of a socket; every read ends at the deadline, so a byte a second does not hold us."""

    def __init__(self, connection: socket.socket, wait_s: Callable[[], float]):
        self.connection, self.wait_s = connection, wait_s
        self.received = self.reads = self.image_bytes = 0

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_Reader(self), PIECE_BYTES)

    def read_into(self, buffer: memoryview) -> int:
        self.connection.settimeout(self.wait_s())
        count = self.connection.recv_into(buffer)
        self.received, self.reads = self.received + count, self.reads + 1
        around = self.received - self.image_bytes  # with what the buffer has read ahead
        if around > AROUND_BYTES + PIECE_BYTES + self.image_bytes // SHARE_AROUND:
            raise TooMuchAround
        if self.reads > FREE_READS + self.received // BYTES_A_READ:
            raise TooMuchAround
        return count


class _Reader(io.RawIOBase):
    def __init__(self, source: CountedSocket):
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self.source.read_into(buffer)
