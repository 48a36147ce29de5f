"""An owner's no is obeyed in every spelling of the address."""

import random

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.opt_out import OptOut, bare
from raphael.stage import StageError

MD5, SHA256 = "0123456789abcdef" * 2, "0123456789abcdef" * 4


def marks(opt_out: OptOut, urls: list, md5: list | None = None) -> list[bool]:
    md5 = md5 or [None] * len(urls)
    return opt_out.marks(pa.array(urls, pa.string()), pa.array(md5, pa.string())).tolist()


@pytest.fixture
def opt_out(tmp_path):
    path = tmp_path / "no.txt"
    path.write_text(
        f"# owners\nhttps://a.example/art/1.jpg?size=2  # one picture\nstudio.example\nbücher.example\n\n"
        f"md5:{MD5.upper()}\nsha256:{SHA256}\n"
    )
    return OptOut.read(str(path))


@pytest.mark.parametrize(
    "url",
    ["https://a.example/art/1.jpg?size=2", "http://A.Example:80/art/1.jpg?size=2#x", "http://a.example./art/%31.jpg?size=2",
     "http://studio.example/x", "https://cdn.img.STUDIO.example/x.png", "http://xn--bcher-kva.example/", "http://bücher.example/"],
)  # fmt: skip
def test_an_address_on_the_list_is_found_however_it_is_written(opt_out, url):
    assert opt_out.has_url(url) and marks(opt_out, [url]) == [True]


@pytest.mark.parametrize(
    "url",
    ["https://a.example/art/1.jpg", "https://a.example/", "http://notstudio.example/x", "http://studio.example.org/x",
     "", None, "http://[bad", "x"],
)  # fmt: skip
def test_others_are_not(opt_out, url):
    assert not opt_out.has_url(url) and marks(opt_out, [url]) == [False]


def test_a_column_is_marked_as_its_addresses_one_by_one(opt_out):
    rng = random.Random(0)
    parts = (
        ("http://", "https://", "HTTP://", "ftp://", " http://", "//", ""),
        ("", "", "", "user@", "a@b:c@"),
        ("a.example", "A.example.", "studio.example", "x.Studio.example", "b.example", "b\u00fccher.example", "[::1]", "", "a_b.c"),
        ("", "", "", ":80", ":x", "\\", "\t"),
        ("/art/1.jpg?size=2", "/art/%31.jpg?size=2#x", "/other", "", "?size=2", "#/art/1.jpg"),
    )  # fmt: skip
    urls = [None if rng.random() < 0.02 else "".join(map(rng.choice, parts)) for _ in range(20_000)]
    want = [opt_out.has_url(url) for url in urls]
    assert marks(opt_out, urls) == want and 0.1 < np.mean(want) < 0.9
    assert opt_out.marks(pa.array(urls).slice(5, 900), pa.nulls(900, pa.string())).tolist() == want[5:905]


def test_hashes_are_obeyed_and_the_entries_counted(opt_out):
    assert marks(opt_out, ["http://b.example/"] * 3, [MD5, None, MD5.upper()]) == [True, False, True]
    assert opt_out.has_sha256([None, SHA256]) and not opt_out.has_sha256([None, "0" * 64])
    assert opt_out.summary() == {"urls": 1, "domains": 2, "md5": 1, "sha256": 1}
    assert opt_out and not OptOut.read("") and opt_out.fingerprint


def test_a_line_that_is_nothing_is_named(tmp_path):
    path = tmp_path / "no.txt"
    path.write_text("studio.example\nmd5:12\n")
    with pytest.raises(StageError, match=r"no.txt:2: got 'md5:12', expected a url, a domain"):
        OptOut.read(str(path))
    with pytest.raises(StageError, match="filter.opt_out: .*absent"):
        OptOut.read(str(tmp_path / "absent"))


def test_an_address_loses_what_does_not_name_the_picture():
    assert bare("HTTPS://user@A.example:8080/x%20y?q#f") == ("a.example/x y?q", "a.example")
