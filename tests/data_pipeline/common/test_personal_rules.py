"""Numbers that lead to a person leave a caption, each counted under its name; what only looks like one stays."""

import random
import re

import pytest

from data_pipeline.common import caption_rules, personal_rules
from data_pipeline.common.caption_rules import clean

# Published examples: Ofcom's and NANPA's numbers for drama, the test numbers of ISO 13616 and of card schemes
TAKEN = {
    "phone number": [
        "+1 212 555 0123", "+12125550123", "+44 20 7946 0018", "+44 (0)20 7946 0018", "+49-30-23125-000",
        "(212) 555-0123", "(212)555-0123", "212-555-0123", "212.555.0123", "1-212-555-0123", "tel: 020 7946 0018",
        "Tel.: 030 23125 000", "phone 5550123", "call us at 212-555-0123", "WhatsApp +34 600 00 00 00",
        "call now 0800 0007 700", "Fax 555 01 23",
    ],
    "iban": [
        "GB82 WEST 1234 5698 7654 32", "GB82WEST12345698765432", "DE89 3704 0044 0532 0130 00",
        "IBAN: FR14 2004 1010 0505 0001 3M02 606", "NO93 8601 1117 947", "MT84MALT011000012345MTLCAST001S",
    ],
    "card number": [
        "4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "3782 822463 10005", "378282246310005",
    ],
    "social security number": ["078-05-1120", "SSN 219-09-9999", "ssn: 457-55-5462", "AB 12 34 56 C",
                               "NI number AB123456C"],
}  # fmt: skip
KEPT = [
    "a bus of line 212 in 2012",
    "1939-1945 and 2001-2019",
    "a size of 10-20-30 cm",
    "12 345 678 people",
    "1.234.567,89 euro",
    "$1,299.99",
    "Apollo 11 1969 07 20",
    "ISO 9001 2015",
    "Boeing 747-400 and 737-800",
    "DE12 3704 0044 0532 0130 00 trains",
    "call of duty 4",
    "call 911",
    "phone 6s and phone 12",
    "tel aviv 2019",
    "cell 7",
    "route 66 of 1926",
    "3-2-1 and 123-45",
    "1:18 scale 1/72",
    "AB 12 of the AB line",
    "2nd of 4 1234 rooms",
    "figure 1.2.3.4",
    "7 12 19 26 days",
    "a mobile home of 1975",
    "Windows 10 1903 build",
    "1920 x 1080 x 60",
    "GT40 P 1075 1968 Le Mans",
    "Psalm 119 105 112",
]
AROUND = ("a cat sits {} on a mat", "a cat ({}) sits", "a cat, {}.", "{} a cat and a dog")


@pytest.mark.parametrize("number", [(rule, number) for rule, numbers in TAKEN.items() for number in numbers])
def test_a_number_is_taken_out_and_counted_under_its_name_wherever_it_stands(number):
    rule, text = number
    for sentence in AROUND:
        cleaned = clean(sentence.format(text))
        assert rule in cleaned.reasons, cleaned
        assert not re.search(r"\d{2}", cleaned.text) and "cat" in cleaned.text, cleaned
        assert clean(cleaned.text) == caption_rules.Cleaned(cleaned.text)
    assert clean(text).text is None


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_one_stays(text):
    assert not set(clean(f"a cat and {text}").reasons) & {*TAKEN, "bidi control"}
    assert not set(clean(f"a cat and {text} beside it").reasons) & set(TAKEN)


def test_a_wrong_check_digit_is_no_account_and_no_card():
    """Every single digit changed: by mod 97 and by Luhn none of them is one any more."""
    for rule, text in [("iban", TAKEN["iban"][0]), ("card number", TAKEN["card number"][0])]:
        for place, char in enumerate(text):
            if char.isdigit():
                other = text[:place] + str((int(char) + 1) % 10) + text[place + 1 :]
                assert rule not in clean(f"a cat {other}").reasons, other


@pytest.mark.parametrize(
    "code", [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0x206A, 0x2070)]
)
def test_every_control_of_writing_direction_leaves_and_is_counted(code):
    cleaned = clean(f"a red {chr(code)}circle left{chr(code)} of a square")
    assert cleaned == caption_rules.Cleaned("a red circle left of a square", ("bidi control",))


def test_the_characters_are_those_that_unicode_calls_bidi_controls():
    """Bidi_Control of Unicode's PropList.txt, and the deprecated 206A to 206F, by Python's own database."""
    import sys
    import unicodedata

    classes = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    found = {char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.bidirectional(char) in classes}
    found |= {"\u061c", "\u200e", "\u200f", *map(chr, range(0x206A, 0x2070))}
    assert found == set(personal_rules.BIDI_CHARS)
    assert all(personal_rules.BIDI_CONTROLS.fullmatch(char) for char in found)


def test_the_short_cuts_never_pass_over_a_number(monkeypatch):
    rng, words = random.Random(0), "a cat sits on the mat of Mr. B in 2012, twice".split()
    numbers = [number for some in TAKEN.values() for number in some] + KEPT
    texts = []
    for number in numbers * 4:
        place = rng.randrange(len(words) + 1)
        texts.append(" ".join([*words[:place], number, *words[place:]]))
    short = [clean(text) for text in texts]
    always = tuple(caption_rules.Rule(rule.name, rule.apply) for rule in caption_rules.RULES)
    monkeypatch.setattr(caption_rules, "RULE_INDEX", caption_rules.RuleIndex(always))
    monkeypatch.setattr(caption_rules, "_is_ordinary", lambda text: False)
    assert [clean(text) for text in texts] == short


@pytest.mark.parametrize(
    "text", ["1" * 50_000, "1 " * 25_000, "(1-" * 16_000, "AB12" * 12_000, "+1" * 20_000, "tel " * 9000]
)
def test_a_long_caption_costs_no_more_than_its_length(text):
    import time

    rules = (personal_rules.without_phones, personal_rules.without_ibans, personal_rules.without_cards,
             personal_rules.without_persons)  # fmt: skip
    for rule in rules:
        began = time.process_time()
        rule(text)
        assert time.process_time() - began < 1.0, rule.__name__
