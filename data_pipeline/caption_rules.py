"""What is taken out of a caption: URLs, HTML tags and e-mail addresses, as the paper says, and what else is no
description.

`clean` applies the table until nothing changes, so it is idempotent. It never makes a caption longer. A caption of
plain words is recognised by one expression and returned as it is.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_PASSES = 8

# Words that only lead to an address, and hang in the air without it.
_LEADING = r"orders?|contact|e-?mail(?: us)?|mail(?: to)?|visit|see|via|from|at|on|by|source|credit"
_LEAD = rf"(?:\b(?:{_LEADING})\b[ \t]*:?[ \t]*)?"
_PICTURE_FILE = r"jpe?g|png|gif|webp|bmp|tiff?|svg|psd|eps|heic|cr2|nef|pdf"
_DOMAIN_END = r"com|net|org|info|biz|edu|gov|shop|blog|co\.uk|com\.au|de|nl|fr|ru"
_BARE_DOMAIN = rf"(?:[a-z0-9-]+\.)*[a-z0-9-]{{2,}}\.(?:{_DOMAIN_END})(?![\w.-]*\w)"
_CONTROL = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd"


@dataclass(frozen=True)
class Cleaned:
    """text: the clean caption, None where nothing describes a picture; reasons: the rules that changed it, in order,
    and last the reason for None."""

    text: str | None
    reasons: tuple[str, ...] = ()


def _sub(pattern: str, replacement: str, flags: int = re.IGNORECASE) -> Callable[[str], str]:
    return functools.partial(re.compile(pattern, flags).sub, replacement)


def _unescape(text: str) -> str:
    return html.unescape(text) if "&" in text else text


def _fix_encoding(text: str) -> str:
    """Mojibake, by ftfy, without expanding ligatures."""
    if text.isascii():
        return text
    import ftfy

    fixed = ftfy.fix_text(text, unescape_html=False, fix_latin_ligatures=False)
    return fixed if len(fixed) <= len(text) else text


def _csv_quotes(text: str) -> str:
    """A cell of a CSV file that was never read as one: "a ""word"" so"."""
    inside = text[1:-1]
    if len(text) > 1 and text[0] == text[-1] == '"' and '""' in inside and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return text


def _trim(text: str) -> str:
    text = text.strip(" \t,;:|/\\_~*=+•·–—-")
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        return text[1:-1]
    return text


_SPACES = re.compile(r"\s+")

# name, what it does. The order matters: entities hide tags, tags hide addresses.
RULES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("doubled quote", _csv_quotes),
    ("entity", _unescape),
    ("control character", _sub(rf"[{_CONTROL}]+", " ")),
    ("encoding", _fix_encoding),
    ("tag", _sub(r"<!--.*?-->|</?[a-z!?][^<>]*(?:>|$)", " ", re.IGNORECASE | re.DOTALL)),
    ("e-mail", _sub(_LEAD + r"(?:mailto:)?[\w.+%-]+@[\w-]+(?:\.[\w-]+)+", " ")),
    ("url", _sub(_LEAD + r"(?:(?:https?|ftp):/*|\bwww\.)[^\s<>\"')\]]*", " ")),
    ("url", _sub(r"https?(?: t co \w+)?", " ")),  # short links without their punctuation
    ("file name", _sub(rf"(?<=\w )([a-z]{{2,}})\.(?:{_PICTURE_FILE})(?=$)", r"\1")),  # a title with an ending: keep it
    ("file name", _sub(rf"[^\s\"'()<>\[\],|]*\.(?:{_PICTURE_FILE})(?!\w)", " ")),
    ("url", _sub(rf"{_LEAD}(?<![\w.@]){_BARE_DOMAIN}(?:/[^\s<>\"')\]]*)?", " ")),
    ("camera code", _sub(r"\b(?:IMG|DSC[NF]?|DCIM|PICT|MVI|GOPR|PXL|SAM|CIMG)[_-]?\d{3,}(?:_\d+)*\b", " ")),
    ("handle", _sub(r"(?<!\w)@[\w.]+|@", " ")),
    ("hashtag", _sub(r"(?<!\w)#(?=[^\W\d])", "")),
    ("angle bracket", _sub(r"[<>]+", " ")),
    ("doubled quote", _sub(r'"{2,}', '"')),
    ("empty brackets", _sub(r"\(\s*\)|\[\s*\]|\{\s*\}", " ")),
    ("ellipsis", _sub(r"^\s*(?:\.{2,}|…)|\s*(?:\.{2,}|…)\s*$", " ")),
    ("repeated punctuation", _sub(r"([^\w\s])\1{2,}", r"\1")),
    ("space", lambda text: _SPACES.sub(" ", text)),
    ("ends", _trim),
)
_CHEAP = ("space", "ends")  # not worth a line in a report
_FILE_RULES = {"file name", "camera code"}

# Words, single spaces, the punctuation of prose: no rule finds anything here but what _HIDDEN knows.
_PLAIN = re.compile(
    r"[A-Za-z0-9](?:[A-Za-z0-9'%]|[,;:!?.]?(?: [-&] | )(?=[A-Za-z0-9])|[-/](?=[A-Za-z0-9])|[!?.](?=$))*"
)
_HIDDEN = re.compile(r"(?:IMG|DSC[NF]?|DCIM|PICT|MVI|GOPR|PXL|SAM|CIMG)[_-]?\d{3}|http", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]")


def clean(text: str) -> Cleaned:
    """The caption without what is no description of a picture, and why it was changed.

    None (with the reason "only a file name" or "no words") where nothing is left.
    """
    if _PLAIN.fullmatch(text) and not _HIDDEN.search(text) and _WORD.search(text):
        return Cleaned(text)
    reasons: dict[str, None] = {}
    for _ in range(MAX_PASSES):
        before = text
        for name, rule in RULES:
            changed = rule(text)
            if changed != text:
                reasons[name] = None
                text = changed
        if text == before:
            break
    else:
        return Cleaned(None, (*reasons, "never clean"))
    shown = tuple(name for name in reasons if name not in _CHEAP)
    if not _WORD.search(text):
        return Cleaned(None, (*shown, "only a file name" if _FILE_RULES & set(shown) else "no words"))
    return Cleaned(text, shown)
