"""What in a caption leads to a person: phone numbers, accounts (IBAN), cards, social security numbers; and controls of
writing direction, by which a caption shows another text than it has.

Numbers with a check digit are taken out only where it is right: "DE12 3456 ..." of a train is none. Phone numbers have
none: they go where a plus, a bracket, dots or dashes as in phone numbers, or a word such as "tel" stands with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Marks (61C, 200E, 200F), embeddings and overrides (202A-202E), isolates (2066-2069), deprecated ones (206A-206F)
BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"
BIDI_CHARS = "\u061c\u200e\u200f" + "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x2070))))
BIDI_CONTROLS = re.compile(f"[{BIDI}]+")

_LABEL = r"(?:tel(?:ephone)?|phone|ph|fax|mobile|mob|cell|whats ?app|viber)"
_LEAD = rf"(?:\b(?:{_LABEL}|call(?: us| me| now)?(?: at| on)?)\b[ \t.:#]*)?"
_PHONE_GATE = r"\d(?:[ ().\-/+]{0,3}\d){6}"
_PHONE = re.compile(
    # (?<!...): not within a longer number, a fraction, a product code
    rf"{_LEAD}(?<![\w+.-])\+\d(?:[ ().\-/]{{0,3}}\d){{6,14}}(?![\w])"
    rf"|{_LEAD}(?<![\w.\-/])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d([.-]))\d{{3}}(?(1)\1|[ .-])\d{{4}}(?![\w-]|[.]\d)"
    rf"|\b(?:{_LABEL}|call(?: us| me| now)?(?: at| on)?)\b[ \t.:#]*(?<!\w)\(?\d(?:[ ().\-/]{{0,3}}\d){{6,14}}(?!\w)",
    re.IGNORECASE,
)

_IBAN_GATE = r"\b[a-z]{2}\d{2} ?[a-z0-9]{4}"
_IBAN = re.compile(r"(?:\bIBAN\b[ :.]*)?\b([A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?)\b")

_SSN = r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"
_NINO = r"(?<!\w)(?![DFIQUV])(?!BG|GB|KN|NK|NT|TN|ZZ)[A-Z](?![DFIOQUV])[A-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?!\w)"
_PERSON_GATE = r"\d{3}-\d{2}-\d{4}|[a-z]{2} ?\d{2} ?\d{2} ?\d{2} ?[a-d]\b"
_LABEL_OF_ID = r"(?:\b(?:ssn|social security(?: number| no\.?)?|ni(?:no)?(?: number)?)\b[ :#.]*)?"
_PERSON = re.compile(rf"(?i:{_LABEL_OF_ID})(?:{_SSN}|{_NINO})")

_CARD_GATE = r"\d{4}[ -]?\d{4}[ -]?\d{4}[ -]?\d{1,4}|\d{4}[ -]?\d{6}[ -]?\d{5}"
_CARD = re.compile(r"(?<![\w.-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{1,4}|3[47]\d{2}([ -]?)\d{6}\2\d{5})(?![\w-])")


def without_phones(text: str) -> str:
    return _PHONE.sub(" ", text)


def without_persons(text: str) -> str:
    """Social security numbers of the USA (no check digit: 123-45-6789 as it is written) and of the United Kingdom."""
    return _PERSON.sub(" ", text)


def without_ibans(text: str) -> str:
    """ISO 13616: the country and check digits moved to the end, letters as 10 to 35, is 1 modulo 97."""
    return _IBAN.sub(lambda match: " " if _is_iban(match[1]) else match[0], text)


def _is_iban(text: str) -> bool:
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


def without_cards(text: str) -> str:
    """Payment cards: 13 to 16 digits, the last of them Luhn's (ISO/IEC 7812)."""
    return _CARD.sub(lambda match: " " if _is_luhn(re.sub(r"\D", "", match[0])) else match[0], text)


def _is_luhn(digits: str) -> bool:
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


_SIX_DIGITS = re.compile(r"(?:[^0-9]*+[0-9]){6}").match  # every number above has as many; most captions have not


def _gate(pattern: str) -> Callable[[str], object]:
    search = re.compile(pattern).search
    return lambda lower: search(lower) if _SIX_DIGITS(lower) else None


RULES = (  # name, what it does, whether it is asked at all, by the caption in lower case
    ("iban", without_ibans, _gate(_IBAN_GATE)),
    ("card number", without_cards, _gate(_CARD_GATE)),
    ("social security number", without_persons, _gate(_PERSON_GATE)),
    ("phone number", without_phones, _gate(_PHONE_GATE)),
)


def may_have_one(lower: str) -> bool:
    """Whether one of the rules would be asked."""
    return _SIX_DIGITS(lower) is not None and any(gate(lower) is not None for _, _, gate in RULES)
