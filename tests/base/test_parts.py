"""Parts of a tensor, as a manifest that a stranger wrote may list them: inside it, apart, and together the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from raphael.base.checkpoint.parts import _is_whole
from raphael.base.manifest import ManifestError, check_files, read_manifest, write_manifest


def entry(shape: list[int], *parts: tuple[list[int], list[int]]) -> dict:
    return {"shape": shape, "parts": [{"at": at, "shape": part} for at, part in parts]}


@pytest.mark.parametrize(
    "whole",
    [
        entry([4], ([0], [4])),
        entry([], ([], [])),
        entry([4, 3], ([2, 0], [2, 3]), ([0, 0], [2, 3])),
        entry([2, 2], ([0, 0], [1, 1]), ([0, 1], [1, 1]), ([1, 0], [1, 1]), ([1, 1], [1, 1])),
    ],
)
def test_parts_side_by_side_make_a_tensor(whole: dict) -> None:
    assert _is_whole(whole)


@pytest.mark.parametrize(
    "broken",
    [
        entry([4], ([0], [2]), ([1], [2])),  # overlapping, and as many elements as the whole
        entry([4], ([0], [2]), ([0], [2])),  # one part twice
        entry([2, 2], ([0, 0], [2, 1]), ([0, 0], [1, 2])),  # overlapping in both dimensions
        entry([2, 2], ([0, 0], [1, 1]), ([0, 1], [1, 1]), ([0, 1], [1, 1]), ([1, 1], [1, 1])),
        entry([4], ([0], [3])),  # too little
        entry([4], ([1], [4])),  # beyond the end
        entry([4], ([-1], [4])),
        entry([4, 1], ([0], [4])),  # of another number of dimensions
    ],
)
def test_parts_that_overlap_or_leave_a_gap_do_not(broken: dict) -> None:
    assert not _is_whole(broken)


def test_a_name_that_leads_out_of_the_folder_is_no_file_of_it(tmp_path: Path) -> None:
    """Though the manifest lists it with the hash that it has."""
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_manifest(folder, "f/1", ["../secret"], {})
    with pytest.raises(ManifestError, match="secret: not in the manifest"):
        check_files(folder, read_manifest(folder, "f/1"))
