"""Captions lose what describes no picture and nothing else; judged on real LAION captions too."""

import re

import pytest

from data_pipeline import caption_rules
from data_pipeline.caption_rules import clean

EXAMPLES = {
    "A red circle left of a blue square": "A red circle left of a blue square",
    "<p>a cat</p>": "a cat",
    "a dog &amp; a cat": "a dog & a cat",
    "&lt;b&gt;a dog&lt;/b&gt;": "a dog",
    "&amp;lt;i&amp;gt;twice escaped": "twice escaped",
    "a cat https://shop.example/item/3": "a cat",
    "a cat - www.pictures.example": "a cat",
    "a cat | http://example.org/1.html": "a cat",
    "a cat, orders: painter1@studio.example": "a cat",
    "a cat (contact sales1@prints.example)": "a cat",
    "Sample Letter from www.doctemplates.net": "Sample Letter",
    "Buy Shoes Online at johnlewis.com": "Buy Shoes Online",
    '&quot;a cat&quot;': "a cat",
    '"""Calm Spirit"" Bangle"': '"Calm Spirit" Bangle',
    "a cat&nbsp;": "a cat",
    "a\tcat\r\n sits": "a cat sits",
    "a cat\u200b sits\x00": "a cat sits",
    "Scorching June for Alabama.jpg": "Scorching June for Alabama",
    "a cat IMG_1234 sits": "a cat sits",
    "#sunset over #paris": "sunset over paris",
    "photo by @someone_here of a cat": "photo by of a cat",
    "a cat!!!!!": "a cat!",
    "holds his nose...": "holds his nose",
    "schÃ¶n": "schön",
    "x < y": "x y",
    "<a href='x": None,
    "IMG_20190412_0042.JPG": None,
    "untitled-12.png": None,
    "http://example.org/": None,
    "-": None,
    "": None,
    "12345": None,
}


@pytest.mark.parametrize("before", EXAMPLES)
def test_a_caption_becomes(before):
    assert clean(before).text == EXAMPLES[before]


def test_only_a_file_name_is_told_from_no_words():
    assert clean("DSC00042.jpg").reasons[-1] == "only a file name"
    assert clean("...").reasons[-1] == "no words"


@pytest.fixture(scope="module")
def laion(shared_data):
    import pyarrow.parquet as pq

    table = pq.read_table(shared_data / "laion" / "laion_url_text_5000.parquet", columns=["TEXT"])
    return [text or "" for text in table["TEXT"].to_pylist()]


def test_real_captions_come_out_without_markup_and_addresses(laion):
    address = re.compile(r"[<>]|https?|www\.\w|\w@\w|[\x00-\x1f]", re.IGNORECASE)
    for text in laion:
        cleaned = clean(text).text
        assert cleaned is None or not address.search(cleaned), (text, cleaned)
        assert cleaned is None or len(cleaned) <= len(text), (text, cleaned)


def test_cleaning_twice_changes_nothing_more(laion):
    for cleaned in map(clean, laion):
        assert cleaned.text is None or clean(cleaned.text) == caption_rules.Cleaned(cleaned.text)


def test_the_short_cut_for_plain_captions_gives_what_the_rules_give(laion, monkeypatch):
    with_short_cut = [clean(text).text for text in laion]
    monkeypatch.setattr(caption_rules, "_PLAIN", re.compile(r"(?!)"))
    assert [clean(text).text for text in laion] == with_short_cut


def test_most_real_captions_keep_every_word(laion):
    words = [(text.split(), (clean(text).text or "").split()) for text in laion]
    assert sum(before == after for before, after in words) / len(laion) > 0.9
