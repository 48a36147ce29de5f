"""One flipped bit in any file of data/ and models/: `raphael data verify` names the file, and so does who reads it.

A disk changes no time of change; a flip by `rot` leaves it as it was, one by `edit` does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from truth.faulty_runs import run_here

from data_pipeline.tools.verify.__main__ import main as verify_main
from data_pipeline.tools.verify.judge import verify
from raphael.base.stage import StageError


@pytest.fixture
def root(data_workspace, tmp_path) -> Path:
    shutil.copytree(data_workspace, tmp_path / "ws", copy_function=shutil.copy2)
    return tmp_path / "ws"


def files_of(root: Path) -> list[Path]:
    return sorted(path for place in ("data", "models") for path in (root / place).rglob("*") if path.is_file())


def edit(path: Path, place: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def rot(path: Path, place: int, bit: int = 2) -> None:
    stat = path.stat()
    edit(path, place, bit)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def check_rounds(root: Path, rounds: int, keep_times: bool) -> int:
    """One bit of every file in each round. Returns how many flips were made; each has to be named, and nothing else."""
    rng, flips, paths = random.Random(rounds), 0, [path for path in files_of(root) if path.stat().st_size]
    for _ in range(rounds):
        undo = {}
        for path in paths:
            undo[path] = (path.read_bytes(), path.stat())
            (rot if keep_times else edit)(path, rng.randrange(path.stat().st_size), rng.randrange(8))
        named = {line.split(": ")[0] for line in verify(root).bad}
        assert named == {path.relative_to(root).as_posix() for path in paths}
        flips += len(paths)
        for path, (data, stat) in undo.items():
            path.write_bytes(data)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return flips


def test_every_flip_in_every_kind_of_file_is_named(root) -> None:
    whole = verify(root)
    assert whole.bad == [] and whole.unknown == [] and whole.files == len(files_of(root))
    kinds = {path.suffix for path in files_of(root)}
    assert {".parquet", ".tar", ".zip", ".json", ".bin", ".txt", ".safetensors"} <= kinds
    flips = check_rounds(root, 6, keep_times=True) + check_rounds(root, 4, keep_times=False)
    assert flips >= 200 and verify(root).bad == []


@pytest.mark.soak
def test_a_thousand_flips_are_named(root) -> None:
    rounds = -(-1000 // len(files_of(root)))
    assert check_rounds(root, rounds, keep_times=True) >= 1000


READ_BY = [
    ("data/source/metadata.parquet", "select"),
    ("data/selected/links.parquet", "download"),
    ("data/selected/links.parquet", "score"),
    ("data/selected/links.parquet", "filter"),
    ("data/shards/00000.parquet", "score"),
    ("data/shards/00000.parquet", "filter"),
    ("data/scores/00000.parquet", "filter"),
    ("data/filtered/pictures.parquet", "captions"),
    ("data/captions/captions.parquet", "encode"),
    ("data/captions/captions.parquet", "clip"),
    ("data/shards/00000.tar", "encode"),
    ("data/shards/00000.tar", "autoencoder"),
    ("models/autoencoder/config.json", "encode"),
    ("models/autoencoder/diffusion_pytorch_model.safetensors", "encode"),
    ("models/clip/model.safetensors", "encode"),
]


def test_the_stage_that_would_read_a_rotten_file_names_it_wherever_the_bit_is(root) -> None:
    rng = random.Random(1)
    for name, stage in READ_BY:
        path = root / name
        whole, stat = path.read_bytes(), path.stat()
        for place in (0, len(whole) - 9, rng.randrange(len(whole)), rng.randrange(len(whole))):
            rot(path, place)
            with pytest.raises(StageError, match=f"^{name}: "):
                run_here(stage, root)
            path.write_bytes(whole)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_image_whose_bytes_are_not_those_that_were_stored_is_named_by_its_key(root) -> None:
    """Also where the time of change says that someone wrote: the table beside the tar has the image's hash."""
    tar = root / "data/shards/00000.tar"
    keys = json.loads((root / "data/records/captions.json").read_text())
    with tarfile.open(tar) as members:
        member = next(m for m in members if m.name.partition(".")[0] in keys and m.name.endswith("png"))
    edit(tar, member.offset_data + member.size // 2)
    key = member.name.partition(".")[0]
    for stage in ("score", "encode"):
        shutil.rmtree(root / "work" / stage)
        with pytest.raises(StageError, match=f"00000.tar: image {key} is damaged: got sha256"):
            run_here(stage, root)


def test_a_flipped_page_of_a_table_that_someone_wrote_is_named(root) -> None:
    """Pages carry a checksum: of the texts, which are nearly all of a table, a flip is seen without any list."""
    table = root / "data/filtered/pictures.parquet"
    group = pq.ParquetFile(table).metadata.row_group(0)
    columns = {group.column(place).path_in_schema: group.column(place) for place in range(group.num_columns)}
    edit(table, columns["caption"].data_page_offset - 3)  # the end of the page of its texts
    with pytest.raises(StageError, match="data/filtered/pictures.parquet: damaged"):
        run_here("captions", root)


def test_a_missing_file_is_named_and_one_that_nothing_vouches_for_is_counted(root) -> None:
    (root / "data/selected/links.parquet").unlink()
    (root / "data/notes.json").write_text("{")
    found = verify(root)
    assert [line.split(": ")[0] for line in found.bad] == ["data/notes.json", "data/selected/links.parquet"]
    assert found.unknown == ["data/notes.json"]


def test_without_lists_files_are_looked_at_by_their_own_checksums(root) -> None:
    shutil.rmtree(root / "work")
    assert verify(root).bad == []
    tar = root / "data/shards/00000.tar"
    with tarfile.open(tar) as members:
        member = next(member for member in members if member.name.endswith(".png"))
    edit(tar, member.offset_data + member.size // 2)
    shard = next((root / "data/records").glob("*.moments.bin"))
    edit(shard, 11)
    archive = root / "data/source/site.zip"
    edit(archive, archive.stat().st_size // 2)
    named = {line.split(": ")[0] for line in verify(root).bad}
    assert named >= {"data/shards/00000.tar", "data/source/site.zip", "data/records/manifest.json"}


# ---- DVC -----------------------------------------------------------------------------------------------------------


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def commit(root: Path, out: str) -> Path:
    """What DVC leaves of a folder that it tracks: dvc.lock, and objects that the files are hard links of. Returns the
    cache."""
    import yaml

    cache = root / ".dvc/cache/files/md5"
    (root / ".dvc").mkdir(exist_ok=True)
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    entries = []
    for path in sorted(path for path in (root / out).rglob("*") if path.is_file()):
        name = md5(path.read_bytes())
        entries.append({"md5": name, "relpath": path.relative_to(root / out).as_posix()})
        (cache / name[:2]).mkdir(parents=True, exist_ok=True)
        os.link(path, cache / name[:2] / name[2:])
    listing = json.dumps(entries).encode()
    name = f"{md5(listing)}.dir"
    (cache / name[:2]).mkdir(parents=True, exist_ok=True)
    (cache / name[:2] / name[2:]).write_bytes(listing)
    outs = [{"path": out, "hash": "md5", "md5": name}]
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"x": {"cmd": "x", "outs": outs}}}))
    return cache


def test_a_flip_that_reached_dvcs_object_through_a_hard_link_is_named_there_and_how_to_restore_it(root, capsys) -> None:
    cache = commit(root, "data/selected")
    shutil.rmtree(root / "work")  # as after `make clean`, or in a clone that pulled
    table = root / "data/selected/links.parquet"
    name = md5(table.read_bytes())
    kept = cache / name[:2] / name[2:]
    params = ["--params", str(root / "params.yaml")]
    assert verify_main([*params, "--cache"]) == 0
    rot(table, 100)
    assert verify_main(params) == 1
    said = capsys.readouterr().err
    assert f"verify: data/selected/links.parquet: damaged: other bytes than were written; delete it and {kept}," in said
    assert verify_main([*params, "--cache"]) == 1
    assert f"verify: {kept}: damaged: its md5 is not its name" in capsys.readouterr().err


def test_a_flip_in_a_copy_is_restored_from_dvcs_whole_object(root, capsys) -> None:
    commit(root, "data/selected")
    table = root / "data/selected/links.parquet"
    whole = table.read_bytes()
    table.unlink()
    table.write_bytes(whole[:-1] + b"?")
    assert verify_main(["--params", str(root / "params.yaml")]) == 1
    assert (
        "links.parquet: changed since its stage published it; delete it, then dvc checkout" in capsys.readouterr().err
    )


def test_every_flip_in_dvcs_cache_is_named(root) -> None:
    cache = commit(root, "data/shards")
    for out in list((root / "data/shards").iterdir()):
        whole = out.read_bytes()
        out.unlink()
        out.write_bytes(whole)  # no hard link any more
    rng = random.Random(2)
    objects = [path for path in cache.rglob("*") if path.is_file()]
    for path in objects:
        rot(path, rng.randrange(path.stat().st_size), rng.randrange(8))
    named = {line.split(": ")[0] for line in verify(root, with_cache=True).bad}
    assert {str(path) for path in objects} <= named


def test_a_place_without_data_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "params.yaml").write_text("")
    assert verify_main(["--params", str(tmp_path / "params.yaml")]) == 1
    assert "no data/ and no models/ here" in capsys.readouterr().err
