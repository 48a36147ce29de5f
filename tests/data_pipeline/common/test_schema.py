"""Columns are found under every release's names, and the two aesthetic scales are never mixed up."""

import json

import pytest

from data_pipeline.common.schema import (
    AESTHETIC,
    CAPTION,
    LANGUAGE,
    MD5,
    SCORES,
    SIMILARITY,
    UNSAFE,
    URL,
    WATERMARK,
    find_columns,
)

BASE = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash")
SCORED = {SIMILARITY, UNSAFE, WATERMARK}

# Release -> its columns as published, and the scores that it has.
RELEASES = {
    "laion2B-en": ((*BASE, "NSFW"), {SIMILARITY}),
    "laion2B-multi": ((*BASE, "LANGUAGE", "NSFW"), {SIMILARITY}),
    "laion2B-en-joined": ((*BASE, "punsafe", "pwatermark"), SCORED),
    "laion2B-multi-joined": ((*BASE, "LANGUAGE", "punsafe", "pwatermark"), SCORED),
    "laion2B-en-md5": ((*BASE, "punsafe", "pwatermark", "md5"), SCORED),
    "laion2B-en-aesthetic (V1)": ((*BASE, "punsafe", "pwatermark", "aesthetic"), SCORED),
    "aesthetics_v2_4.5": ((*BASE, "punsafe", "pwatermark", "AESTHETIC_SCORE"), SCORED | {AESTHETIC}),
    "relaion2B-en-research-safe": (("url", "caption", "similarity", "hash", "punsafe", "pwatermark"), SCORED),
    "relaion2B-en-research-safe, links alone": (("url", "caption"), set()),
    "relaion2B-multi-aesthetic (V1)": ((*BASE, "LANGUAGE", "punsafe", "pwatermark", "aesthetic"), SCORED),
    "coyo-700m": (
        ("id", "url", "text", "width", "height", "image_phash", "text_length", "word_count", "num_tokens_bert",
         "num_tokens_gpt", "num_faces", "clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2",
         "nsfw_score_gantman", "watermark_score", "aesthetic_score_laion_v2"),
        SCORED | {AESTHETIC},
    ),
    "after img2dataset": (("url", "caption", "key", "status", "width", "height", "sha256"), set()),
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_every_release_has_its_parts_and_no_others(release):
    names, scores = RELEASES[release]
    columns = find_columns(names)
    assert columns[URL] in ("URL", "url") and columns[CAPTION] in ("TEXT", "text", "caption")
    assert {score for score in SCORES if score in columns} == scores
    assert (columns.aesthetic_v1 == "aesthetic") == ("(V1)" in release)
    assert (LANGUAGE in columns) == ("LANGUAGE" in names) and (MD5 in columns) == ("md5" in names)


def test_real_rows_of_two_releases_have_the_columns_that_were_expected(shared_data):
    import pyarrow.parquet as pq

    laion = pq.read_schema(shared_data / "laion/laion_url_text_5000.parquet").names
    assert find_columns(laion).found == {URL: "URL", CAPTION: "TEXT"}
    first = (shared_data / "laion/coyo_preview_rows.jsonl").read_text().splitlines()[0]
    assert tuple(json.loads(first)) == RELEASES["coyo-700m"][0]
    assert find_columns(json.loads(first))[SIMILARITY] == "clip_similarity_vitl14"


def test_the_v2_score_is_found_and_the_v1_score_is_named_as_such():
    assert find_columns(RELEASES["aesthetics_v2_4.5"][0])[AESTHETIC] == "AESTHETIC_SCORE"
    assert find_columns(RELEASES["coyo-700m"][0])[AESTHETIC] == "aesthetic_score_laion_v2"
    v1 = find_columns(("URL", "TEXT", "aesthetic"))
    assert v1.aesthetic_v1 == "aesthetic" and AESTHETIC not in v1
    assert find_columns(("URL", "TEXT", "aesthetic", "AESTHETIC_SCORE")).aesthetic_v1 is None


def test_a_list_without_links_says_what_it_has_and_what_was_expected():
    with pytest.raises(ValueError, match="got columns link, TEXT, expected one for the url: any of URL, url"):
        find_columns(("link", "TEXT"))
