"""An owner's no is obeyed in every spelling of the address."""

import random

import pytest

from data_pipeline.common.opt_out import OptOut, bare
from raphael.base.stage import StageError

MD5, SHA256 = "0123456789abcdef" * 2, "0123456789abcdef" * 4


@pytest.fixture
def opt_out(tmp_path):
    path = tmp_path / "no.txt"
    path.write_text(
        f"# owners\nhttps://a.example/art/1.jpg?size=2  # one image\nstudio.example\nbücher.example\n\n"
        f"md5:{MD5.upper()}\nsha256:{SHA256}\n"
    )
    return OptOut.read(str(path))


@pytest.mark.parametrize(
    "url",
    ["https://a.example/art/1.jpg?size=2", "http://A.Example:80/art/1.jpg?size=2#x", "http://a.example./art/%31.jpg?size=2",
     "http://studio.example/x", "https://cdn.img.STUDIO.example/x.png", "http://xn--bcher-kva.example/", "http://bücher.example/"],
)  # fmt: skip
def test_an_address_on_the_list_is_found_however_it_is_written(opt_out, url):
    assert opt_out.has_url(url) and opt_out.marks([url], [None]).tolist() == [True]


@pytest.mark.parametrize(
    "url",
    ["https://a.example/art/1.jpg", "https://a.example/", "http://notstudio.example/x", "http://studio.example.org/x",
     "", None, "http://[bad", "x"],
)  # fmt: skip
def test_others_are_not(opt_out, url):
    assert not opt_out.has_url(url)


def test_what_is_remembered_of_a_host_is_what_each_of_its_addresses_would_give(opt_out, monkeypatch):
    rng = random.Random(0)
    parts = (
        ("http://", "https://", "HTTP://", "ftp://", " http://", "//", ""),
        ("", "", "", "user@", "a@b:c@"),
        ("a.example", "A.example.", "studio.example", "x.Studio.example", "b\u00fccher.example", "[::1]", "a_b.c"),
        ("", "", "", ":80", ":x", "\\", "\t", "\n"),
        ("/art/1.jpg?size=2", "/art/%31.jpg?size=2#x", "/other", "", "?size=2", "#/art/1.jpg"),
    )  # fmt: skip
    urls = ["".join(map(rng.choice, parts)) for _ in range(20_000)]
    monkeypatch.setattr("data_pipeline.common.opt_out.MOST_HOSTS", 4)

    def by_itself(url: str) -> bool:
        address, host = bare(url)
        labels = host.split(".")
        parents = {".".join(labels[start:]) for start in range(len(labels))}
        return address in opt_out.urls or bool(parents & opt_out.domains)

    want = [by_itself(url) for url in urls]
    assert [opt_out.has_url(url) for url in urls] == want and 0.1 < sum(want) / len(urls) < 0.9


def test_hashes_are_obeyed_and_the_entries_counted(opt_out):
    assert opt_out.marks(["http://b.example/"] * 3, [MD5, None, MD5.upper()]).tolist() == [True, False, True]
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


def test_an_address_loses_what_does_not_name_the_image():
    assert bare("HTTPS://user@A.example:8080/x%20y?q#f") == ("a.example/x y?q", "a.example")
