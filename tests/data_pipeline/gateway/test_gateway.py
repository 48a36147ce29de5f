"""The gateway opens nothing but whole public images. Servers on loopback and an injected resolver play the web."""

from __future__ import annotations

import dataclasses
import io
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
from attacks import images
from PIL import Image
from truth.hostile_urls import HOSTILE, NAMES
from truth.raw_web import HOST, answer, web

from data_pipeline.gateway import addresses, image_header
from data_pipeline.gateway import proxy as gateway
from data_pipeline.gateway.addresses import Refusal, Resolver, is_public, parse
from data_pipeline.gateway.proxy import Fetched, Gateway, Policy, Refused, fetch
from raphael.base.config.params import load_config
from raphael.base.strict import to_dict

ROOT = Path(__file__).resolve().parents[3]
QUICK = {"timeout_s": 0.4, "deadline_s": 1.0, "retries": 0}


def image_bytes(kind: str, size=(30, 20)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "teal").save(stream, kind)
    return stream.getvalue()


def bomb(side: int, depth: int = 8) -> bytes:
    """A PNG's header that promises side x side RGBA pixels of so many bits a channel."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", side, side, depth, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + b"\0" * 64


def ask(page: object, **limits) -> Fetched | Refused:
    with web({"/x": page}) as (port, _):
        return fetch(f"http://{HOST}/x", Policy(local_host=HOST, local_port=port, **{**QUICK, **limits}))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
def test_a_whole_image_of_each_kind_goes_through_byte_for_byte(kind):
    body = image_bytes(kind)
    fetched = ask(answer(body))
    assert isinstance(fetched, Fetched) and fetched.body == body
    assert (fetched.header.format, fetched.header.width_px, fetched.header.height_px) == (kind, 30, 20)


@pytest.mark.parametrize("size", [(300, 17), (17, 300), (1, 16383), (16383, 1), (5000, 4097)])
@pytest.mark.parametrize("lossless", [True, False])
def test_the_size_of_a_webp_is_read_as_it_is(size, lossless):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, "webp", lossless=lossless, method=0)
    header = image_header.read_header(stream.getvalue())
    assert (header.width_px, header.height_px) == size


def resolve_names(host: str, port: int) -> list[str]:
    if host not in NAMES:
        raise socket.gaierror("unknown name")
    return NAMES[host]


@pytest.mark.parametrize(("reason", "url"), [(reason, url) for reason, urls in HOSTILE.items() for url in urls])
def test_a_hostile_url_is_refused_with_its_reason_and_nothing_is_connected_to(reason, url, monkeypatch):
    def no_connection(self, address, port):
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(gateway._Attempt, "_connect", no_connection)
    policy = Policy(local_host=HOST, local_port=8080, resolver=Resolver(resolve_names), **QUICK)
    assert fetch(url.format(port=8080), policy) == Refused(reason)


def test_the_hostile_urls_are_many_and_the_guard_does_not_refuse_everything():
    assert sum(map(len, HOSTILE.values())) >= 40
    with web({"/x": answer(image_bytes("png"))}) as (port, asked):
        policy = Policy(local_host=HOST, local_port=port, resolver=Resolver(resolve_names), **QUICK)
        assert isinstance(fetch(f"http://{HOST}/x", policy), Fetched) and asked == ["/x"]
        assert fetch(f"http://127.0.0.1:{port}/x", policy) == Refused("private address") and asked == ["/x"]


def test_addresses_of_this_machines_interfaces_are_refused_though_they_are_public(monkeypatch):
    own = {"eth0": ["93.184.215.14"], "eth1": ["2606:2800::14"]}
    entry = namedtuple("entry", "family address")
    family = {False: socket.AF_INET, True: socket.AF_INET6}
    listed = {name: [entry(family[":" in text], text) for text in texts] for name, texts in own.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: listed)
    monkeypatch.setattr(addresses, "_known_own", (float("-inf"), frozenset()))
    for own_one in ("93.184.215.14", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e", "2606:2800::14"):
        with pytest.raises(Refusal, match="own address"):
            addresses.judge(["8.8.8.8", own_one])
    addresses.judge(["93.184.215.15", "2606:2800::15"])


@pytest.mark.parametrize(
    ("address", "is_refused"),
    [("203.1.2.3", True), ("203.1.3.3", False), ("::ffff:203.1.2.3", True), ("64:ff9b::cb01:203", True),
     ("2a00:1450::7", True), ("2a00:1451::7", False), ("9.9.9.9", True), ("9.9.9.10", False)],
)  # fmt: skip
def test_networks_of_the_settings_are_refused_in_every_form_of_their_addresses(address, is_refused, monkeypatch):
    dialled = []
    monkeypatch.setattr(gateway._Attempt, "_connect", lambda self, *where: dialled.append(where) or socket.socket())
    policy = Policy(
        refused_networks=("203.1.2.9/24", "2a00:1450::/32", "9.9.9.9"), resolver=Resolver(lambda *_: [address]), **QUICK
    )
    outcome = fetch("http://somewhere.example/x", policy)
    assert (outcome == Refused("refused network")) == is_refused == (not dialled)


def test_a_network_that_is_none_is_refused_with_its_setting(tmp_path):
    config = load_config(ROOT / "params.yaml").download
    assert "refused_networks" not in to_dict(config)  # work begun before the setting was there keeps its name
    with pytest.raises(ValueError, match="refused_networks: got 'intranet.example', expected an address or a network"):
        dataclasses.replace(config, refused_networks=("10.0.0.0/8", "intranet.example"))


@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1:{port}/secret", "http://[::1]:{port}/secret", "file:///etc/hostname", "//0x7f.1:{port}/secret",
     "http://169.254.169.254/", f"http://{HOST}/secret", "http://loop.example:{{port}}/secret", "/loop", "gopher://a/"],
)  # fmt: skip
def test_a_redirect_is_judged_like_a_link(location):
    pages: dict[str, object] = {"/secret": answer(image_bytes("png"))}
    with web(pages) as (port, asked):
        pages["/x"] = answer(b"", "302 Found", f"Location: {location.format(port=port)}")
        pages["/loop"] = pages["/x"]
        resolver = Resolver(lambda host, port: ["127.0.0.1"])
        outcome = fetch(f"http://{HOST}/x", Policy(local_host=HOST, local_port=port, resolver=resolver, **QUICK))
        assert isinstance(outcome, Refused)
        assert "/secret" not in asked


def test_public_hosts_are_connected_to_at_the_checked_address_and_redirects_followed(monkeypatch):
    """Rebinding: a name that is public when it is checked and private a moment later is not asked a second time."""
    answers = iter([["93.184.215.14"], ["127.0.0.1"], ["127.0.0.1"]])
    dialled: list[tuple[str, int]] = []
    moved = answer(b"", "301 Moved", "Location: /b?c=d%20e")
    pages: dict[str, object] = {"/a": moved, "/b?c=d%20e": answer(image_bytes("png"))}
    with web(pages) as (port, asked):

        def connect(self, address, wanted_port):
            dialled.append((address, wanted_port))
            return socket.create_connection(("127.0.0.1", port), 1)

        monkeypatch.setattr(gateway._Attempt, "_connect", connect)
        outcome = fetch("http://rebinding.example/a", Policy(resolver=Resolver(lambda *_: next(answers)), **QUICK))
        assert isinstance(outcome, Fetched)
        assert dialled == [("93.184.215.14", 80)] * 2 and asked == ["/a", "/b?c=d%20e"]


def endless(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + image_bytes("jpeg")[:400])
    while True:
        connection.sendall(b"\0" * 65536)


def reset(connection):
    connection.sendall(answer(image_bytes("png"), length=10_000))
    time.sleep(0.1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def drip(start: bytes, pause_s: float):
    def page(connection):
        connection.sendall(start)
        while True:
            time.sleep(pause_s)
            connection.sendall(b"x")

    return page


BAD_ANSWERS = {
    "http 404": answer(b"gone", "404 Not Found"),
    "http 500": answer(b"", "500 Oh"),
    "http 206": answer(image_bytes("png"), "206 Partial Content"),
    "not a picture": answer(b"<!doctype html><title>This picture has moved</title>"),
    "not a picture, svg": answer(b"<svg xmlns='http://www.w3.org/2000/svg'></svg>      "),
    "not a picture, tiff": answer(b"II*\0" + b"\0" * 100),
    "not a picture, short": answer(b"\xff\xd8\xff"),
    "not a picture, a frame hidden from the header": answer(images.hidden_frame_jpeg()),
    "not a picture, animated png": answer(images.animated_png()),
    "too many scans": answer(images.many_scans_jpeg()),
    "empty answer": answer(b""),
    "truncated": answer(image_bytes("png"), length=10_000),
    "truncated, reset": reset,
    "truncated, jpeg cut but length right": answer(image_bytes("jpeg")[:-80]),
    "truncated, png cut but length right": answer(image_bytes("png")[:-20]),
    "truncated, webp": answer(image_bytes("webp")[:-8]),
    "truncated, gif": answer(image_bytes("gif")[:-4]),
    "too many pixels": answer(bomb(8000)),
    "too many decoded bytes": answer(bomb(900, 16)),
    "opted out by X-Robots-Tag": answer(image_bytes("png"), "200 OK", "X-Robots-Tag: NoImageAI, nofollow"),
    "opted out by X-Robots-Tag, us": answer(image_bytes("png"), "200 OK", "X-Robots-Tag: raphael-open: noindex"),
    "too many bytes": answer(b"", length=10**9),
    "too many bytes, endless": endless,
    "compressed answer": answer(zlib.compress(b"\0" * 10**6), "200 OK", "Content-Encoding: gzip"),
    "timeout": lambda connection: time.sleep(2),
    "too slow": drip(b"HTTP/1.1 200 OK\r\n\r\n\x89PNG\r\n\x1a\n", 0.1),
    "too slow, headers": drip(b"HTTP/1.1 200 OK\r\nX: ", 0.1),
    "answer not understood": b"SSH-2.0-OpenSSH_9.0\r\n\r\n",
    "answer not understood, header": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    "too many redirects": answer(b"", "302 Found", "Location: http://bouncing.example/x"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_is_refused_with_its_reason(name, monkeypatch):
    started_s = time.monotonic()
    if name == "too many redirects":
        with web({"/x": BAD_ANSWERS[name]}) as (port, _):
            monkeypatch.setattr(gateway._Attempt, "_connect", lambda *_: socket.create_connection(("127.0.0.1", port)))
            policy = Policy(resolver=Resolver(lambda *_: ["93.184.215.14"]), **QUICK)
            outcome = fetch("http://bouncing.example/x", policy)
    else:
        outcome = ask(BAD_ANSWERS[name], max_bytes=1_000_000, max_pixels=10**6, max_decoded_bytes=6 * 10**6)
    assert isinstance(outcome, Refused) and outcome.reason == name.split(",")[0]
    assert time.monotonic() - started_s < 10  # no hang


def test_what_may_pass_is_tried_again_and_what_will_not_is_not():
    calls = []

    def flaky(connection):
        calls.append(1)
        connection.sendall(answer(b"", "503 Busy") if len(calls) == 1 else answer(image_bytes("png")))

    assert isinstance(ask(flaky, retries=1), Fetched) and len(calls) == 2
    with web({}) as (port, asked):
        policy = Policy(local_host=HOST, local_port=port, **{**QUICK, "retries": 3})
        assert fetch(f"http://{HOST}/x", policy) == Refused("http 404")
        assert asked == ["/x"]


def test_a_dead_server_and_an_unknown_name_are_reasons():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert fetch(f"http://{HOST}/x", Policy(local_host=HOST, local_port=port, **QUICK)) == Refused("no connection")

    def slow(host, port):
        time.sleep(3)
        return ["93.184.215.14"]

    assert fetch("http://slow.example/", Policy(resolver=Resolver(slow), **QUICK)) == Refused("name not found")


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_public(address):
    assert is_public(address)


def test_a_url_is_taken_apart_as_a_browser_would():
    target = parse("HTTP://Example.COM./a b/ü.jpg?q=1 2#part")
    assert (target.host, target.port, target.path) == ("example.com", 80, "/a%20b/%C3%BC.jpg?q=1%202")
    assert parse("https://bücher.example:8443").authority == "xn--bcher-kva.example:8443"
    with pytest.raises(Refusal):
        parse("http://0x7f.1/")


@pytest.mark.parametrize(
    "value", ["all", "googlebot: noindex", "max-snippet: 5", "otherbot: noai, noindex", "", "nofollow"]
)
def test_what_is_said_to_others_or_about_other_things_is_no_opt_out(value):
    assert not gateway.opted_out([value], "raphael-open")
    assert isinstance(ask(answer(image_bytes("png"), "200 OK", f"X-Robots-Tag: {value}")), Fetched)
    assert gateway.opted_out([value, "noai"], "raphael-open")


def test_headers_are_read_at_every_length_without_error():
    for kind in ("jpeg", "png", "webp", "gif"):
        body = image_bytes(kind, (70, 50))
        headers = [image_header.read_header(body[:cut]) for cut in range(len(body) + 1)]
        assert {(header.width_px, header.height_px) for header in headers if header} == {(70, 50)}


@pytest.fixture
def running():
    pages: dict[str, object] = {
        "/x": answer(image_bytes("png")),
        "/robots": answer(image_bytes("png"), "200 OK", "X-Robots-Tag: noai"),
    }
    with web(pages) as (port, asked), Gateway(Policy(local_host=HOST, local_port=port, **QUICK)) as door:
        yield door, asked


def test_the_gateway_serves_what_it_signed_and_says_why_not(running):
    door, _ = running
    with urllib.request.urlopen(door.sign(5, f"http://{HOST}/x")) as response:
        assert response.read() == image_bytes("png")
    with pytest.raises(urllib.error.HTTPError, match="HTTP Error 502: opted out by X-Robots-Tag"):
        urllib.request.urlopen(door.sign(5, f"http://{HOST}/robots"))
    with pytest.raises(urllib.error.HTTPError, match="HTTP Error 502: http 404"):
        urllib.request.urlopen(door.sign(6, f"http://{HOST}/gone"))
    with pytest.raises(urllib.error.HTTPError, match="HTTP Error 502: private address"):
        urllib.request.urlopen(door.sign(7, "http://10.0.0.1/"))
    assert door.answered == 4


def test_the_gateway_serves_nothing_that_it_did_not_sign(running):
    door, asked = running
    good = door.sign(5, f"http://{HOST}/x")
    head, row, signature, encoded = good.rsplit("/", 3)
    other = door.sign(5, "http://a.example/").rsplit("/", 1)[1]
    forged = [
        f"{head}/6/{signature}/{encoded}", f"{head}/5/{'0' * 32}/{encoded}", f"{head}/5/{signature}/{other}",
        f"{head}/", f"{head}/x",
        f"{head}/5//{encoded}", f"{head}/http://{HOST}/x", f"{head}/é/{signature}/{encoded}".replace("é", "%C3%A9"),
    ]  # fmt: skip
    for url in forged:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(url)
    with Gateway(door.policy) as another, pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(good.replace(str(door.port), str(another.port)))
    assert asked == []


def test_the_gateway_listens_on_loopback_alone(running):
    assert running[0].server.server_address[0] == "127.0.0.1"


def test_no_host_gets_more_connections_than_allowed(monkeypatch):
    busy, most, lock = [0], [0], threading.Lock()

    def slow_page(connection):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.05)
        with lock:  # before the answer: whoever has it may ask again at once
            busy[0] -= 1
        connection.sendall(answer(image_bytes("png")))

    with web({"/x": slow_page}) as (port, _):
        monkeypatch.setattr(gateway._Attempt, "_connect", lambda *_: socket.create_connection(("127.0.0.1", port)))
        limits = {"timeout_s": 5, "deadline_s": 10, "per_host": 2}
        policy = Policy(resolver=Resolver(lambda *_: ["93.184.215.14"]), **limits)
        outcomes: list = []

        def ask_it() -> None:
            outcomes.append(fetch("http://one.example/x", policy))

        threads = [threading.Thread(target=ask_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most[0] <= 2 and all(isinstance(outcome, Fetched) for outcome in outcomes)


def test_names_are_remembered_but_not_for_ever():
    asked = []
    resolver = Resolver(lambda host, port: asked.append(host) or ["93.184.215.14"])
    for _ in range(3):
        resolver.addresses("a.example", 80, 1)
    assert asked == ["a.example"]
    resolver.cache["a.example"] = (time.monotonic() - addresses.CACHED_S - 1, ["93.184.215.14"])
    resolver.addresses("a.example", 80, 1)
    assert len(asked) == 2
