"""The loopback image server: as good and as broken as the site says, closed to everything else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from PIL import Image

from data_pipeline.download.serve_images import serve, site_of
from raphael.base.config.params import load_config
from raphael.base.stage import StageError


@pytest.fixture
def site(tmp_path) -> Path:
    Image.new("RGB", (64, 64), (200, 30, 40)).save(tmp_path / "red.png")
    body = (tmp_path / "red.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        for name in ("a/good.png", "a/stalls.png", "a/cut.png"):
            archive.writestr(name, body)
        archive.writestr("a/page.jpg", "<!doctype html><title>Gone</title>")
        archive.writestr("a/with space.png", body)
        archive.writestr("behaviours.json", json.dumps({"a/stalls.png": "stall", "a/cut.png": "cut"}))
    return tmp_path / "site.zip"


def get(port: int, path: str, timeout_s: float = 5.0) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("Content-Type")
    finally:
        connection.close()


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        link.sendall(request)
        return link.recv(200)


def test_good_files_are_served_whole_and_unknown_ones_are_404(site):
    with serve(site) as server:
        status, body, kind = get(server.port, "/a/good.png")
        assert (status, kind) == (200, "image/png") and body == (site.parent / "red.png").read_bytes()
        assert get(server.port, "/a/with%20space.png?width=3")[0] == 200
        assert get(server.port, "/a/none.png")[0] == 404
        assert get(server.port, "/behaviours.json")[0] == 404
        assert server.counts == {"200": 2, "404": 2}


def test_a_page_in_the_place_of_an_image_says_what_it_is(site):
    with serve(site) as server:
        assert get(server.port, "/a/page.jpg") == (
            200,
            b"<!doctype html><title>Gone</title>",
            "text/html; charset=utf-8",
        )


def test_a_cut_body_ends_before_its_stated_length(site):
    with serve(site) as server, pytest.raises(http.client.IncompleteRead):
        get(server.port, "/a/cut.png")


def test_a_stalled_answer_never_comes_and_does_not_keep_the_server_from_ending(site):
    with serve(site) as server:
        with pytest.raises(TimeoutError):
            get(server.port, "/a/stalls.png", timeout_s=0.3)
        link = socket.create_connection(("127.0.0.1", server.port))
        link.sendall(b"GET /a/stalls.png HTTP/1.1\r\nHost: x\r\n\r\n")
        assert get(server.port, "/a/good.png")[0] == 200
        began = time.monotonic()
    link.close()
    assert time.monotonic() - began < 5
    with pytest.raises(OSError):
        get(server.port, "/a/good.png", timeout_s=1)


def test_one_connection_serves_many_requests_and_many_connections_at_once(site):
    with serve(site) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        sockets = set()
        for path in ("/a/good.png", "/a/none.png", "/a/good.png"):
            connection.request("GET", path)
            connection.getresponse().read()
            sockets.add(id(connection.sock))
        assert len(sockets) == 1 and connection.sock is not None
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(get(server.port, "/a/good.png")[0])) for _ in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 24
        connection.close()


def test_it_listens_on_loopback_alone(site):
    with serve(site) as server:
        listening = [
            link.laddr for link in psutil.Process().net_connections("inet") if link.status == psutil.CONN_LISTEN
        ]
        assert [address.ip for address in listening if address.port == server.port] == ["127.0.0.1"]


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.png",
        "/sub/../../secret.png",
        "/%2e%2e/secret.png",
        "//secret.png/../../secret.png",
        "/out.png",
        "/notes.txt",
        "/sub",
        "/%00.png",
    ],
)
def test_a_folder_is_served_by_its_images_and_no_path_leads_out_of_it(tmp_path, path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in (tmp_path / "secret.png", root / "sub/in.png"):
        Image.new("RGB", (8, 8)).save(name)
    (root / "notes.txt").write_text("private")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    with serve(root) as server:
        assert get(server.port, "/sub/in.png")[0] == 200
        assert b" 404 " in raw(server.port, b"GET " + path.encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_missing_site_a_broken_archive_and_a_busy_port_are_said_in_one_line(site, tmp_path):
    (tmp_path / "half.zip").write_bytes(site.read_bytes()[:100])
    with pytest.raises(StageError, match="no such file or folder to serve"), serve(tmp_path / "none.zip"):
        pass
    with pytest.raises(StageError, match="not a whole archive"), serve(tmp_path / "half.zip"):
        pass
    with (
        serve(site) as server,
        pytest.raises(StageError, match=f"port {server.port} on 127.0.0.1"),
        serve(site, server.port),
    ):
        pass


def test_the_program_ends_with_the_one_that_started_it(site, project):
    code = (
        "import subprocess, sys, time;"
        f"command = [sys.executable, '-m', 'data_pipeline.download.serve_images', {str(site)!r}];"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True);"
        "print(child.pid, child.stdout.readline().strip(), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=project)
    pid, address = parent.stdout.readline().split()
    assert get(int(address.rstrip("/").rsplit(":", 1)[1]), "/a/good.png")[0] == 200
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 15
    while (
        psutil.pid_exists(int(pid))
        and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
        and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_the_site_of_a_configuration_is_the_archive_of_drawn_scenes_or_none(project):
    from dataclasses import replace

    config = load_config(project / "params.yaml")
    assert site_of(config) == Path("data/source/site.zip")
    for kind in ("coco", "folder", "pictures", "webdataset", "parquet", "csv"):
        assert site_of(replace(config, source=replace(config.source, kind=kind, path="photos"))) is None
