"""Pieces of unfinished work: which of them count, and what is said of those that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from raphael.base.integrity.pieces import NAME, Pieces


@pytest.fixture
def piece(tmp_path: Path) -> Path:
    (tmp_path / "chunks").mkdir()
    path = tmp_path / "chunks/0.npz"
    path.write_bytes(b"0123456789" * 50)
    Pieces(tmp_path, "encode").add(path)
    return path


def test_a_listed_piece_counts_in_the_next_run(tmp_path: Path, piece: Path, capsys: pytest.CaptureFixture) -> None:
    assert Pieces(tmp_path, "encode").has(piece)
    assert not Pieces(tmp_path, "encode").has(tmp_path / "chunks/1.npz")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: b"", "got 0 bytes, expected 500"),
        (lambda data: data[:250], "got 250 bytes, expected 500"),
        (lambda data: data[:77] + bytes([data[77] ^ 4]) + data[78:], "its hash does not fit"),
    ],
)
def test_a_damaged_piece_is_named_once_and_removed(
    tmp_path: Path, piece: Path, capsys: pytest.CaptureFixture, damage, said: str
) -> None:
    piece.write_bytes(damage(piece.read_bytes()))
    pieces = Pieces(tmp_path, "encode")
    assert not pieces.has(piece) and not piece.exists() and not pieces.has(piece)
    assert capsys.readouterr().err == f"encode: {piece}: damaged ({said}): made again\n"


def test_a_piece_that_was_never_listed_does_not_count(
    tmp_path: Path, piece: Path, capsys: pytest.CaptureFixture
) -> None:
    other = piece.with_name("1.npz")
    other.write_bytes(b"renamed, and then the power went")
    assert not Pieces(tmp_path, "encode").has(other)
    assert "1.npz: not finished: made again" in capsys.readouterr().err


def test_of_files_that_belong_together_one_damaged_one_takes_the_others_with_it(tmp_path: Path) -> None:
    tar, table = tmp_path / "0.tar", tmp_path / "0.parquet"
    for path in (tar, table):
        path.write_bytes(b"whole")
    Pieces(tmp_path, "download").add(tar, table)
    tar.write_bytes(b"")
    assert not Pieces(tmp_path, "download").has(tar, table)
    assert not tar.exists() and not table.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.95])
def test_a_list_cut_anywhere_keeps_the_lines_before_and_takes_new_ones(tmp_path: Path, share: float) -> None:
    paths = [tmp_path / f"{number}" for number in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode())
    Pieces(tmp_path, "x").add(*paths)
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[: int(share * len(data))])
    cut = Pieces(tmp_path, "x")
    assert set(cut.known) == {path.name for path in paths[: len(cut.known)]}
    assert abs(len(cut.known) - 20 * share) < 1.5
    paths[19].write_bytes(b"19")
    cut.add(paths[19])
    assert set(Pieces(tmp_path, "x").known) == {*cut.known, "19"}


def test_a_piece_made_again_counts_by_its_newest_line(tmp_path: Path, piece: Path) -> None:
    piece.write_bytes(b"otherwise")
    Pieces(tmp_path, "encode").add(piece)
    assert Pieces(tmp_path, "encode").has(piece)
    assert Pieces(tmp_path, "encode").hashes(piece.parent).keys() == {"0.npz"}
