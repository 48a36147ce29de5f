"""Files of weights from strangers: adapters, single files, pickles, exports, guides, pipeline folders.

Each is damaged, and made to lie, in every way of hostile_files.py, and given to the command that reads it. It takes it
or says one line: nothing else comes out, nothing is left behind, nothing outside is touched.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.hostile_files import (
    damaged,
    ended_in_a_line,
    hostile_json,
    hostile_safetensors,
    kind,
    parsed,
    safetensors,
    write,
)
from truth.tiny_adapter import made_pairs
from truth.tiny_raphael import write_pipeline

from raphael.cli.main import main

OUT = "out"


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture
def one_tokenizer(monkeypatch) -> None:
    """open_clip's own table takes a second to read, each time, and is not what is attacked."""
    from raphael.encoders import clip

    monkeypatch.setattr(clip, "_tokenizer", functools.cache(clip._tokenizer))


def imported(source: Path, out: Path) -> Callable[[], int]:
    def act() -> int:
        shutil.rmtree(out, ignore_errors=True)
        return main(["import", str(source), "--out", str(out)])

    return act


# ---- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    from raphael.systems.lora.file import PEFT_FILE, Header, write_lora

    folder = tmp_path_factory.mktemp("adapters")
    pairs = made_pairs(("attention",))
    write_lora(folder / "kohya.safetensors", pairs, Header("", 2, 2.0))
    write_lora(folder / PEFT_FILE, pairs, Header("", 2, 2.0), "peft")
    return folder


def adapter_in_use(model: Path, file: Path) -> Callable[[], int]:
    from raphael.base.stage import StageError, one_clear_line
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(model)

    def act() -> int:
        if main(["lora", "info", str(file)]):
            return 1
        with one_clear_line("lora") as outcome:
            try:
                pipeline.load_lora_weights(file, "a")
                pipeline.unload_lora_weights()
            except ValueError as error:
                raise StageError(str(error)) from None
        return outcome.status

    return act


@pytest.mark.parametrize("name", ["kohya.safetensors", "adapter_model.safetensors"])
def test_an_adapters_file_is_read_or_refused_in_a_line(model, adapters, tmp_path, capsys, tried, name):
    file, whole = tmp_path / name, (adapters / name).read_bytes()
    act = adapter_in_use(model, file)
    file.write_bytes(whole)
    assert ended_in_a_line(act, capsys) == "taken"
    rng = random.Random(name)
    for what, data in (*damaged(whole, rng, 30), *hostile_safetensors(whole), *odd_adapters(whole)):
        file.write_bytes(data)
        tried("a LoRA's file", name, kind(what), ended_in_a_line(act, capsys))


def odd_adapters(whole: bytes):
    """Numbers that are none, and headers in diffusers' word that say nonsense."""
    header, body = parsed(whole)
    for value in ("{", "[]", "7", "null", '{"lora_alpha": "x"}', '{"lora_alpha": [1]}', '{"lora_alpha": 1e999}',
                  '{"alpha_pattern": 7}', '{"alpha_pattern": {"": null}}', '{"lora_alpha": NaN}', "[" * 100_000,
                  '{"unet.r": 2, "unet.lora_alpha": null}'):  # fmt: skip
        said = {**header, "__metadata__": {"lora_adapter_metadata": value}}
        said = {key: entry for key, entry in said.items() if not key.endswith(".alpha")}
        kept, offset = {}, 0
        pieces = []
        for key, entry in said.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                pieces.append(body[begin:end])
                entry = {**entry, "data_offsets": [offset, offset + end - begin]}
                offset += end - begin
            kept[key] = entry
        yield f"metadata {value[:20]}", safetensors(json.dumps(kept).encode(), b"".join(pieces))


def test_what_peft_wrote_beside_an_adapter_is_read_or_refused_in_a_line(model, adapters, tmp_path, capsys, tried):
    folder = tmp_path / "peft"
    shutil.copytree(adapters, folder)
    (folder / "kohya.safetensors").unlink()
    beside = folder / "adapter_config.json"
    act = adapter_in_use(model, folder)
    for what, text in hostile_json(beside.read_text(), random.Random(1), 60):
        write(beside, text)
        tried("a LoRA's settings", "adapter_config.json", kind(what), ended_in_a_line(act, capsys))


# ---- one file ------------------------------------------------------------------------------------------------------


def test_a_single_file_is_imported_or_refused_in_a_line(model, tmp_path, capsys, tried):
    assert main(["export", str(model), "--format", "safetensors", "--out", str(tmp_path / "made")]) == 0
    (single,) = (tmp_path / "made").glob("*.safetensors")
    whole, file, out = single.read_bytes(), tmp_path / "a.safetensors", tmp_path / OUT
    act = imported(file, out)
    header, body = parsed(whole)
    for what, data in (*damaged(whole, random.Random(2), 12), *hostile_safetensors(whole)):
        file.write_bytes(data)
        tried("a single file", "import", kind(what), ended_in_a_line(act, capsys))
    for field in ("meta", "files"):
        for what, text in hostile_json(header["__metadata__"][field], random.Random(field), 25):
            if "\udcff" in text:
                continue
            said = {**header, "__metadata__": {**header["__metadata__"], field: text}}
            file.write_bytes(safetensors(json.dumps(said).encode(), body))
            tried("a single file", f"its header's {field}", kind(what), ended_in_a_line(act, capsys))
    for name in (
        "../planted",
        "/tmp/planted-by-import",
        "a/../../planted",
        "a\0b",
        "manifest.json",
        "",
        ".",
        "x" * 300,
    ):
        files = json.dumps({**json.loads(header["__metadata__"]["files"]), name: "{}"})
        said = {**header, "__metadata__": {**header["__metadata__"], "files": files}}
        file.write_bytes(safetensors(json.dumps(said).encode(), body))
        tried("a single file", "a file's name", name[:20], ended_in_a_line(act, capsys))
    assert {path.name for path in tmp_path.iterdir()} <= {"made", "a.safetensors", OUT}, "left behind"
    assert not Path("/tmp/planted-by-import").exists() and not (tmp_path.parent / "planted").exists()


# ---- an export's folder, a pipeline's folder, a guide's ------------------------------------------------------------


MOST = 7  # attempts on one file of a folder


def every_file(folder: Path, act: Callable[[], int], capsys, tried, target: str) -> None:
    """Each file of a folder in turn, the others whole."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole, rng, name = path.read_bytes(), random.Random(path.name), path.relative_to(folder).as_posix()
        cases: list = list(damaged(whole, rng, 3))
        if path.suffix == ".safetensors":
            cases += hostile_safetensors(whole)
        if path.suffix == ".json":
            cases += hostile_json(whole.decode(), rng, 12)
        for what, content in rng.sample(cases, MOST):
            write(path, content)
            try:
                tried(target, name, kind(what), ended_in_a_line(act, capsys))
            except BaseException as error:
                raise AssertionError(f"{name}: {what}") from error
        path.unlink()
        tried(target, name, "gone", ended_in_a_line(act, capsys))
        path.write_bytes(whole)


def test_an_exports_folder_is_imported_or_refused_in_a_line(model, tmp_path, capsys, tried):
    folder = tmp_path / "export"
    assert main(["export", str(model), "--out", str(folder)]) == 0
    every_file(folder, imported(folder, tmp_path / OUT), capsys, tried, "an export's folder")


def opened(folder: Path) -> Callable[[], int]:
    from raphael.base.stage import StageError, one_clear_line
    from raphael.generate.pipeline import RaphaelPipeline

    def act() -> int:
        with one_clear_line("generate") as outcome:
            try:
                RaphaelPipeline.from_pretrained(folder)("a red circle", num_inference_steps=1)
            except ValueError as error:
                raise StageError(str(error)) from None
        return outcome.status

    return act


def test_a_pipelines_folder_that_nobody_sealed_is_opened_or_refused_in_a_line(
    model, tmp_path, capsys, tried, one_tokenizer
):
    folder = tmp_path / "raphael"
    shutil.copytree(model, folder)
    (folder / "contents.json").unlink(missing_ok=True)
    every_file(folder, opened(folder), capsys, tried, "a pipeline's folder")


def resigned(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint and its hashes into the manifest: who made the folder can do that."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sign(folder, manifest)


def sign(folder: Path, manifest: dict) -> None:
    content = {key: value for key, value in manifest.items() if key != "sha256"}

    def text(data: dict) -> bytes:
        return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    sha256 = hashlib.sha256(text(content)).hexdigest()
    write(folder / "manifest.json", text({**content, "sha256": sha256}))


def test_a_checkpoint_whose_maker_signed_the_lie_is_opened_or_refused_in_a_line(
    model, tmp_path, capsys, tried, one_tokenizer
):
    folder = tmp_path / "raphael"
    shutil.copytree(model, folder)
    (folder / "contents.json").unlink(missing_ok=True)
    act, meta = opened(folder), (folder / "meta.json").read_text()
    resigned(folder, "meta.json", meta.encode())
    assert ended_in_a_line(act, capsys) == "taken"
    for what, text in hostile_json(meta, random.Random(3), 60):
        try:
            resigned(folder, "meta.json", text.encode("utf-8", "surrogateescape"))
            tried("a signed checkpoint", "meta.json", kind(what), ended_in_a_line(act, capsys))
        except BaseException as error:
            raise AssertionError(f"meta.json: {what}") from error
    resigned(folder, "meta.json", meta.encode())
    manifest = json.loads((folder / "manifest.json").read_text())
    for what, text in hostile_json(json.dumps(manifest), random.Random(4), 60):
        try:
            said = json.loads(text)
            if isinstance(said, dict):
                sign(folder, said)
            else:
                write(folder / "manifest.json", text)
        except (ValueError, RecursionError):
            write(folder / "manifest.json", text)
        try:
            tried("a signed checkpoint", "manifest.json", kind(what), ended_in_a_line(act, capsys))
        except BaseException as error:
            raise AssertionError(f"manifest.json: {what}") from error
