"""Columns are found under every release's names, and the two aesthetic scales are never mixed up."""

import pytest

from data_pipeline.schema import AESTHETIC, CAPTION, SIMILARITY, UNSAFE, URL, WATERMARK, find_columns

RELEASES = {
    "laion2B-en": ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark"),
    "aesthetics_v2": ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "punsafe", "pwatermark", "AESTHETIC_SCORE"),
    "relaion2B-en": ("url", "caption", "key", "status"),
    "coyo": ("id", "url", "text", "width", "height", "watermark_score", "aesthetic_score_laion_v2"),
}


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_has_a_url_and_a_caption(release):
    columns = find_columns(RELEASES[release])
    assert columns[URL] in ("URL", "url")
    assert columns[CAPTION] in ("TEXT", "text", "caption")
    assert set(columns.found) | set(columns.missing) >= {URL, CAPTION, SIMILARITY, UNSAFE, WATERMARK, AESTHETIC}


def test_the_v2_score_is_found_and_the_v1_score_is_named_as_such():
    assert find_columns(RELEASES["aesthetics_v2"])[AESTHETIC] == "AESTHETIC_SCORE"
    assert find_columns(RELEASES["coyo"])[AESTHETIC] == "aesthetic_score_laion_v2"
    v1 = find_columns(("URL", "TEXT", "aesthetic"))
    assert v1.aesthetic_v1 == "aesthetic" and AESTHETIC not in v1
    assert find_columns(("URL", "TEXT", "aesthetic", "AESTHETIC_SCORE")).aesthetic_v1 is None


def test_a_list_without_links_says_what_it_has_and_what_was_expected():
    with pytest.raises(ValueError, match="got columns link, TEXT, expected one for the url: any of URL, url"):
        find_columns(("link", "TEXT"))
