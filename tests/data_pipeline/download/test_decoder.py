"""An image that ends its decoder is dropped and named, and nothing else is lost by it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from attacks import images
from PIL import Image

from data_pipeline.download import decoder
from data_pipeline.download import stage as download
from data_pipeline.download.decoder import KILLED, Guard, GuardedResizer, Limits
from raphael.base.config.params import load_config
from raphael.base.stage import Stage

SETTINGS = {
    "image_size": 64, "resize_mode": "keep_ratio", "resize_only_if_bigger": True, "upscale_interpolation": "lanczos",
    "downscale_interpolation": "area", "encode_quality": 6, "encode_format": "png", "max_image_area": 50e6,
}  # fmt: skip
LIMITS = Limits(max_pixels=50_000_000, memory_bytes=200_000_000, processor_s=1)


@pytest.fixture(scope="module")
def guard(project):
    guard = Guard(LIMITS, SETTINGS)
    yield guard
    guard.close()


def harmless() -> list[bytes]:
    return [data for kind in images.harmless().values() for data in kind]


def big(mode: str = "RGB", size: tuple[int, int] = (700, 300)) -> bytes:
    return images.encoded(Image.effect_noise(size, 40).convert(mode), "PNG")


def test_the_guarded_resizer_answers_as_img2datasets_own_does(guard):
    own = decoder.resizer(SETTINGS, LIMITS)
    for data in [*harmless(), big(), big("RGBA"), big("L"), b"no picture", b"", big()[:900]]:
        assert guard.decode(data) == own(io.BytesIO(data))


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (lambda: images.clearing_gif(400_000), "too much processor time"),
        (lambda: images.blank_png(2400, 2400), "too much memory"),
    ],
)
def test_an_image_past_the_limits_ends_its_child_alone(guard, attack, words):
    assert guard.decode(big())[1:] == (149, 64, 700, 300, None)
    guardian = guard.process.pid
    assert guard.decode(attack()) == (None,) * 5 + (f"{KILLED}: {words}",)
    assert guard.decode(big())[1:] == (149, 64, 700, 300, None)
    assert guard.process.pid == guardian


def test_opencv_refuses_a_size_past_the_limit_before_it_takes_memory(guard):
    *nothing, error = guard.decode(images.hidden_frame_jpeg())
    assert nothing == [None] * 5 and "CV_IO_MAX_IMAGE_PIXELS" in error


def kill_when_busy(guard: Guard, times: int, who: str = "child") -> threading.Thread:
    """Kill what decodes, or its guardian, so many times, each a moment after it took an image."""

    def kill() -> None:
        for _ in range(times):
            victim = None
            while victim is None:
                time.sleep(0.02)
                guardian = psutil.Process(guard.process.pid) if guard.process else None
                for child in guardian.children() if guardian else []:
                    if child.cpu_times().user > 0.2:
                        victim = guardian if who == "guardian" else child
            victim.kill()
            victim.wait() if who == "child" else time.sleep(0.3)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def patient():
    guard = Guard(Limits(50_000_000, 400_000_000, 60), SETTINGS)
    yield guard
    guard.close()


@pytest.mark.parametrize("who", ["child", "guardian"])
def test_a_child_that_the_machine_killed_gets_a_second_try(patient, who):
    slow = images.clearing_gif(30_000)
    killer = kill_when_busy(patient, 1, who)
    *nothing, error = patient.decode(slow)
    killer.join()
    assert error == "Image decoding error"  # what it ends with when it is left alone
    assert patient.decode(big())[1] == 149


def test_an_image_whose_child_is_killed_twice_is_given_up(patient):
    killer = kill_when_busy(patient, 2)
    *nothing, error = patient.decode(images.clearing_gif(400_000))
    killer.join()
    assert error == f"{KILLED}: SIGKILL"
    assert patient.decode(big())[1] == 149


def test_a_child_killed_while_it_waits_loses_no_image(guard):
    guard.decode(big())
    for _ in range(3):
        (child,) = psutil.Process(guard.process.pid).children()
        child.kill()
        psutil.wait_procs([child], timeout=10)
        assert guard.decode(big())[1] == 149


def test_no_process_is_left_when_the_worker_is_gone(project):
    code = (
        "import io, os, sys; sys.path[:0] = ['tests']\n"
        "from data_pipeline.download.decoder import Guard, Limits\n"
        f"guard = Guard(Limits(*{(1000, 10**9, 9)}), {SETTINGS!r}); guard.decode(b'x' * 99)\n"
        "print(guard.process.pid, flush=True); sys.stdin.read() or os._exit(0)"
    )
    for ending in ("killed", "ended"):
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as worker:
            guardian = psutil.Process(int(worker.stdout.readline()))
            family = [guardian, *guardian.children()]
            assert len(family) == 2
            worker.kill() if ending == "killed" else worker.stdin.close()
        assert not psutil.wait_procs(family, timeout=20)[1]


def test_a_decoder_that_does_not_start_is_an_error_and_no_image_is_blamed():
    with pytest.raises(RuntimeError, match="did not start"):
        Guard(LIMITS, {"encode_format": "none"}).decode(big())


def test_one_guard_serves_all_shards_of_a_worker():
    first, second = (GuardedResizer(LIMITS, **SETTINGS) for _ in range(2))
    assert first(io.BytesIO(big()))[1] == second(io.BytesIO(big()))[1] == 149
    (guard,) = decoder._guards.values()
    assert guard.number == 2
    decoder._guards.clear()
    guard.close()


ROWS, HOSTILE = 37, 23


@pytest.fixture(scope="module")
def hostile_list(project, tmp_path_factory) -> tuple[Path, dict]:
    """A workspace whose list has 37 links; what is behind one of them keeps the decoder busy for half a minute."""
    folder = tmp_path_factory.mktemp("hostile")
    site = folder / "site"
    site.mkdir()
    secret = b"bytes behind the end"
    for row in range(ROWS):
        body = images.encoded(Image.new("RGB", (80, 60), (row, 2 * row, 3 * row)), "JPEG") + secret
        (site / f"{row}.jpg").write_bytes(images.clearing_gif(600_000) if row == HOSTILE else body)
    (folder / "data/selected").mkdir(parents=True)
    links = {
        "id": range(ROWS),
        "url": [f"http://scenes.invalid/{row}.jpg" for row in range(ROWS)],
        "caption": [f"picture {row}" for row in range(ROWS)],
    }
    pq.write_table(pa.table(links), folder / "data/selected/links.parquet")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["download"].update(shard_rows=ROWS, max_decoder_s=1, timeout_s=10.0, deadline_s=20.0, stall_s=300.0)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return folder, params


def test_a_shard_of_37_rows_with_one_decoder_killer_keeps_36_and_names_the_row(hostile_list, monkeypatch, capfd):
    folder, _ = hostile_list
    monkeypatch.chdir(folder)
    monkeypatch.setattr("data_pipeline.download.serve_images.site_of", lambda config: folder / "site")
    started, before = [], set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(download._Downloads, "download", counted(download._Downloads.download, started))
    download.run(load_config(folder / "params.yaml"), Stage("download", folder))
    report = json.loads((folder / "reports/download.json").read_text())
    key = f"{HOSTILE:09d}"
    assert (report["total"], report["kept"], report["dropped"]) == (ROWS, ROWS - 1, {KILLED: 1})
    assert report["decoder_killed"] == [key]
    assert f"{KILLED}: row {key} of 00000.parquet, 'http://scenes.invalid/{HOSTILE}.jpg'" in capfd.readouterr().err
    assert len(started) == 1  # no second run of the downloader, no retry of the shard
    rows = pq.read_table(folder / "data/shards/00000.parquet").to_pylist()
    assert [row["reason"] for row in rows] == [KILLED if row == HOSTILE else None for row in range(ROWS)]
    assert b"bytes behind the end" not in (folder / "data/shards/00000.tar").read_bytes()  # nothing foreign goes on
    assert not psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=20)[1]


def counted(function, calls: list):
    def count(*arguments):
        calls.append(1)
        return function(*arguments)

    return count


@pytest.mark.slow
def test_a_download_killed_while_it_decodes_the_hostile_row_ends_in_the_same_bytes(hostile_list, tmp_path, project):
    folder, params = hostile_list
    whole = {path.name: path.read_bytes() for path in (folder / "data/shards").iterdir()}
    assert len(whole) == 2, "the test before made them"
    (tmp_path / "data").mkdir()
    (tmp_path / "data/selected").symlink_to(folder / "data/selected")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    code = (
        "import sys; from pathlib import Path; from data_pipeline import download, serve_images as site\n"
        f"site.site_of = lambda config: Path({str(folder / 'site')!r})\n"
        "sys.exit(download.main('download', download.run, ''))"
    )
    environment = {**os.environ, "PYTHONPATH": str(project)}
    start = {"args": [sys.executable, "-c", code], "cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE}
    with subprocess.Popen(**start, start_new_session=True) as running:
        while not decodes(running.pid):
            time.sleep(0.05)
            assert running.poll() is None, running.stderr.read()
        os.killpg(running.pid, signal.SIGKILL)
    done = subprocess.run(**start, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "data/shards").iterdir()} == whole


def decodes(stage: int) -> bool:
    """Whether a decoder's child below the stage is busy with more than a small image."""
    for process in psutil.Process(stage).children(recursive=True):
        try:
            if (
                "data_pipeline.download.decoder" in process.cmdline()
                and not process.children()
                and process.cpu_times().user > 0.4
            ):
                return True
        except psutil.NoSuchProcess:
            continue
    return False
