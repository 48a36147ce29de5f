"""What is sent to break a server: refused by a status, in bounded time and memory, and the next request works."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from raphael.serve import server as serving
from raphael.serve.bodies import IMAGE_CHARS, LARGEST_SEED, MAX_IMAGES, MAX_STEPS, PROMPT_CHARS
from raphael.serve.door.intake import Bounds

ASKED = {"prompt": "a red circle"}


def raw(port: int, data: bytes, seconds: float = 5.0) -> bytes:
    """What the server says to bytes as they are, until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def refused(served: Any, path: str, body: Any, field: str | None, status: int = 422) -> dict[str, Any]:
    answer = served.client.post(path, json=body)
    assert answer.status_code == status, f"{answer.status_code} {answer.text[:300]}"
    assert answer.headers["content-type"] == "application/problem+json"
    told = answer.json()
    assert told["status"] == status and told.get("field") == field, told
    assert len(answer.content) < 2000
    return told


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_inference_steps", 10**9),
        ("num_inference_steps", MAX_STEPS + 1),
        ("num_inference_steps", 0),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", "15"),
        ("num_inference_steps", True),
        ("width", 10**6),
        ("width", 136),  # beyond what the model may be asked for
        ("width", 33),  # no multiple
        ("height", -8),
        ("n", MAX_IMAGES + 1),
        ("n", 0),
        ("prompt", "x" * (PROMPT_CHARS + 1)),
        ("prompt", ["a"]),
        ("prompt", None),
        ("negative_prompt", "x" * (PROMPT_CHARS + 1)),
        ("seed", -1),
        ("seed", LARGEST_SEED + 1),
        ("guidance_scale", 1e9),
        ("guidance_scale", -1),
        ("sampler", "magic"),
        ("eta", 2),
        ("eta", 0.5),  # of ddim alone
        ("guidance_interval.0", [2, 3]),
        ("guidance_interval", [0.5]),
        ("guidance_interval", [0.9, 0.1]),
        ("stepz", 1),
        ("__proto__", {}),
        ("model", "x" * 200),
    ],
)
def test_what_is_out_of_range_or_unknown_is_named(gated, gate, field, value):
    served = gated()
    refused(served, "/v1/images", {**ASKED, field.split(".")[0]: value}, field)
    assert not gate.begun


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "tiny/../tiny", "..", "models:/raphael@best", "owner/name", "TINY", ""]
)
def test_a_model_is_an_id_and_never_a_path(gated, name):
    told = refused(gated(), "/v1/images", {**ASKED, "model": name}, "model", 404)
    assert told["allowed"] == ["tiny"] and "passwd" not in told["detail"]


@pytest.mark.parametrize(
    "path",
    ["/page/../../../../etc/passwd", "/page/..%2f..%2f..%2fetc/passwd", "/page/%2e%2e/app.py", "/docs/files/../app.py"],
)
def test_files_lead_nowhere_outside_of_their_folder(gated, path):
    port = gated().port
    answer = raw(port, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 "), answer[:200]
    assert b"root:" not in answer and b"create_app" not in answer


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[1]", 400),
        (b'"x"', 400),
        (b"null", 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", 400),
        (b'{"prompt": "x", "guidance_scale": NaN}', 422),
        (b'{"prompt": "x", "guidance_scale": Infinity}', 422),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "\\ud800"}', 422),
        (b'{"prompt": "x", "\\ud800": 1}', 400),
        (b'{"prompt": "x", "' + b"n" * 50_000 + b'": 1}', 422),
    ],
)
def test_a_body_that_is_no_body_is_a_problem(gated, gate, body, status):
    served = gated()
    answer = served.client.post("/v1/images", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and len(answer.content) < 1000
    assert not gate.begun


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_of_another_page_can_send_is_not_read(gated, gate, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = gated().client.post("/v1/images", content=json.dumps(ASKED).encode(), headers=headers)
    assert answer.status_code == 415 and not gate.begun


def test_a_body_too_long_is_refused_by_its_word_and_by_its_bytes(gated):
    served = gated(bounds=Bounds(body_bytes=1000))
    head = f"POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
    said = raw(served.port, f"{head}Content-Length: 100000000\r\n\r\n".encode())
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    streamed = raw(served.port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 2)
    for answer in (said, streamed):
        assert answer.startswith(b"HTTP/1.1 413 ") and b"1,000 bytes" in answer
    asked = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Length: 5\r\n\r\nhello"
    assert raw(served.port, asked.encode()).startswith(b"HTTP/1.1 413 ")


def test_bodies_without_end_share_one_bound(gated):
    served = gated(bounds=Bounds(body_bytes=40_000, all_bytes=50_000, seconds=1))
    head = f"POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
    begun = f"{head}Content-Length: 40000\r\n\r\n".encode() + b" " * 30_000
    with socket.create_connection(("127.0.0.1", served.port)) as one:
        one.sendall(begun)
        time.sleep(0.2)
        second = raw(served.port, begun)
        assert second.startswith(b"HTTP/1.1 503 ") and b"retry-after" in second.lower()
        one.settimeout(5)
        assert one.recv(1000).startswith(b"HTTP/1.1 408 ")  # it never sent the rest
    assert served.client.post("/v1/images", json={"prompt": 1}).status_code == 422


def test_memory_is_flat_under_bodies_without_end_and_bodies_that_come_slowly(gated, gate):
    """What they hold together is bounded, and given back: rounds after the first add nothing."""
    bounds = Bounds(body_bytes=40_000, images_bytes=4 << 20, all_bytes=16 << 20, seconds=0.5)
    served = gated(bounds=bounds)
    named = f"Host: 127.0.0.1:{served.port}\r\nContent-Type: application/json\r\n"
    part = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

    def endless() -> int:
        """-> bytes that could be sent before the server closed."""
        sent = 0
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as one, contextlib.suppress(OSError):
            one.sendall(f"POST /v1/edits/image HTTP/1.1\r\n{named}Transfer-Encoding: chunked\r\n\r\n".encode())
            while sent < 64 << 20:
                one.sendall(part)
                sent += len(part)
        return sent

    def slow() -> bytes:
        """A byte every 20 ms, of a body that is said to have many. -> the status line, or b"": closed before it."""
        with socket.create_connection(("127.0.0.1", served.port), timeout=0.02) as one:
            one.sendall(f"POST /v1/images HTTP/1.1\r\n{named}Content-Length: 39999\r\n\r\n".encode())
            while True:
                try:
                    return one.recv(12)
                except TimeoutError:
                    with contextlib.suppress(ConnectionError):
                        one.sendall(b" ")
                except ConnectionError:
                    return b""

    process, after = psutil.Process(), []
    assert served.client.get("/healthz").status_code == 200
    most = before = process.memory_info().rss
    with ThreadPoolExecutor(24) as pool:
        for _ in range(4):
            streams, trickles = ([pool.submit(act) for _ in range(12)] for act in (endless, slow))
            while not all(one.done() for one in streams + trickles):
                most = max(most, process.memory_info().rss)
                time.sleep(0.01)
            assert all(one.result() < 32 << 20 for one in streams)  # 4 MB, and what the sockets hold
            assert {one.result() for one in trickles} <= {b"HTTP/1.1 408", b"HTTP/1.1 503", b""}
            after.append(process.memory_info().rss)
    print(f"{(most - before) >> 20} MB at most, {[(rss - before) >> 20 for rss in after]} MB after each round")
    assert most - before < 3 * bounds.all_bytes  # with what sockets and h11 hold; unbounded it would be 48 times it
    assert after[-1] - after[0] < 8 << 20, [rss >> 20 for rss in after]
    assert not gate.begun and served.client.get("/healthz").status_code == 200


def test_heads_that_come_slowly_or_not_at_all_are_closed(gated, monkeypatch):
    monkeypatch.setattr(serving, "HEAD_S", 0.3)
    served = gated()
    started_s = time.monotonic()
    assert raw(served.port, b"") == b"" and raw(served.port, b"GET / HTTP/1.1\r\nHost: ") == b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as slow:
        slow.sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode())
        slow.sendall(b"GET /he")  # the second on the same connection
        answer = b""
        while part := slow.recv(5000):
            answer += part
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1") == 1
    assert time.monotonic() - started_s < 3
    assert raw(served.port, b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000).startswith(b"HTTP/1.1 400 ")


def png_bytes(width: int, height: int, rows: int) -> bytes:
    """A PNG whose header says width x height, with so many rows of zeros, packed a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(kind: str, size: tuple[int, int] = (32, 32)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


BOMBS = {
    "400 million pixels": b64(png_bytes(20_000, 20_000, 10)),
    "a long strip": b64(png_bytes(100_000, 10, 1)),
    "half a file": b64(picture("PNG")[:60]),
    "a broken header": b64(b"\x89PNG\r\n\x1a\n" + b"x" * 100),
    "a GIF": b64(picture("GIF")),
    "a TIFF": b64(picture("TIFF")),
    "an SVG": b64(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
    "a page": b64(b"<html><script>alert(1)</script>"),
    "no base64": "not base64!",
    "an address": "http://127.0.0.1/secret.png",
    "a path": "file:///etc/passwd",
    "nothing": "",
    "a data URI of nothing": "data:image/png;base64,",
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_upload_that_is_no_bearable_image_is_refused_before_it_is_queued(gated, gate, name):
    told = refused(gated(), "/v1/edits/image", {**ASKED, "image": BOMBS[name]}, "image")
    assert not gate.begun and "passwd" not in told["detail"]


def test_a_bomb_within_the_bound_costs_what_its_pixels_do_and_many_cost_no_more(gated, gate):
    served = gated()
    bomb = b64(png_bytes(4096, 4096, 4096))  # 50 kB, 50 MB decoded
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    for _ in range(3):
        answer = served.client.post("/v1/edits/image?wait=false", json={**ASKED, "image": bomb})
        assert answer.status_code == 202
    assert process.memory_info().rss - before < 200 << 20
    refused(served, "/v1/edits/image", {**ASKED, "image": b64(png_bytes(4097, 4097, 1))}, "image")
    assert all(task.images["image"].shape == (32, 32, 3) and task.body.image == "" for task in gate.begun)


def test_an_upload_has_a_bound_of_its_own_and_images_only_where_there_are_any(gated):
    served = gated()
    refused(served, "/v1/edits/image", {**ASKED, "image": "A" * (IMAGE_CHARS + 4)}, "image")
    refused(served, "/v1/edits/image", {**ASKED, "image": "A" * (17 << 20)}, None, 413)
    refused(served, "/v1/images", {**ASKED, "prompt": "A" * (65 << 10)}, None, 413)


def test_script_in_a_prompt_comes_back_as_json_alone(gated, gate):
    script = "</script><script>alert(1)</script>"
    served = gated()
    for body in ({"prompt": script, "sampler": script}, {"prompt": "x", script: 1}, {"prompt": "x", "model": script}):
        answer = served.client.post("/v1/images", json=body)
        assert answer.status_code in (404, 422)
        assert answer.headers["content-type"].startswith("application/") and "json" in answer.headers["content-type"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    page = served.client.get(f"/{script}")
    assert page.status_code == 404 and "json" in page.headers["content-type"]


def test_two_hundred_clients_get_an_answer_or_a_429_and_none_hangs(gated, gate):
    """Three steps a job, released all the time: what waits is bounded by the queue."""
    served = gated()
    for _ in range(3000):
        gate.step.release()

    async def ask_all() -> list[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=20, limits=limits, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/images", json=ASKED) for _ in range(200)))
        return [answer.status_code for answer in answers]

    with ThreadPoolExecutor(1) as own:  # the page's tests leave a running event loop in this thread: Playwright's
        statuses = own.submit(lambda: asyncio.run(ask_all())).result()
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 32
