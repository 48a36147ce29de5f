"""A server that would keep a core busy is left after some bytes and milliseconds; honest ones that are slow, or send
small chunks, are heard to their end."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image
from truth.raw_web import HOST, web

from data_pipeline.gateway.proxy import Fetched, Policy, Refused, fetch

DEADLINE_S = 20.0
MOST_CPU_S = 1.0  # 5 % of a core for that long


def asked(page: object) -> tuple[Fetched | Refused, float]:
    """What comes of it, and the processor time that it took this thread."""
    with web({"/x": page}) as (port, _):
        policy = Policy(local_host=HOST, local_port=port, timeout_s=5.0, deadline_s=DEADLINE_S, retries=0)
        began_s = time.thread_time()
        outcome = fetch(f"http://{HOST}/x", policy)
        return outcome, time.thread_time() - began_s


def endless(start: bytes, piece: bytes):
    def page(connection) -> None:
        connection.sendall(start)
        block = piece * (65536 // len(piece))
        while True:  # until the gateway hangs up
            connection.sendall(block)

    return page


def photograph() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((400, 300), 80).convert("RGB").save(stream, "JPEG", quality=95)
    return stream.getvalue()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"
START = photograph()[:4000]  # its size is in it, so that what follows is not refused for its header
CHUNKED_START = CHUNKED + b"%x\r\n%b\r\n" % (len(START), START)
ENDLESS = {
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim answers with headers": (b"", b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n"),
    "chunks of one byte": (CHUNKED_START, b"1\r\nA\r\n"),
    "chunk extensions": (CHUNKED_START, b"1;" + b"x" * 500 + b"\r\nA\r\n"),
    "trailers": (CHUNKED_START + b"0\r\n", b"a: b\r\n"),
    "comments before the size": (OK + b"\r\n" + JPEG, b"\xff\xfe\x00\x02"),
    "restart markers before the size": (OK + b"\r\n" + JPEG, b"\xff\xd0"),
    "fill before the size": (OK + b"\r\n" + JPEG, b"\xff"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_answer_costs_a_twentieth_of_a_core_at_most(kind: str) -> None:
    outcome, cpu_s = asked(endless(*ENDLESS[kind]))
    assert isinstance(outcome, Refused) and outcome.reason in ("answer not understood", "not a picture")
    assert cpu_s < MOST_CPU_S, f"{kind}: {cpu_s:.2f} s"


@pytest.mark.parametrize("size", [64, 512, 4096])
def test_an_image_in_small_chunks_comes_through(size: int) -> None:
    body = photograph()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    outcome, _ = asked(CHUNKED + chunks + b"0\r\nX-Trailer: yes\r\n\r\n")
    assert isinstance(outcome, Fetched) and outcome.body == body


def test_an_interim_answer_and_many_headers_are_nothing_strange() -> None:
    body = photograph()
    headers = b"".join(b"X-Header-%d: %b\r\n" % (number, b"v" * 1000) for number in range(90))
    head = b"HTTP/1.1 100 Continue\r\n\r\n" + OK + headers
    outcome, _ = asked(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert isinstance(outcome, Fetched) and outcome.body == body


def test_an_image_a_few_bytes_at_a_time_comes_through() -> None:
    body = photograph()

    def dripping(connection) -> None:
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n" % len(body))
        for at in range(0, 300):
            connection.sendall(body[at : at + 1])
            time.sleep(0.0005)
        connection.sendall(body[300:])

    outcome, _ = asked(dripping)
    assert isinstance(outcome, Fetched) and outcome.body == body
