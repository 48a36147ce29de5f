"""What is taken out of a caption: URLs, HTML tags and e-mail addresses, as the paper says, and what else is no
description: entities, file names, camera codes, handles, numeric dates and ids, what stock agencies add, mojibake.

`clean` applies the table until nothing changes, so it is idempotent. It never makes a caption longer, and words that
describe stay: those of a hashtag, of a file name that is a sentence, of dates that are written out. A rule is asked
only where its trigger occurs, and a caption of ordinary words asks for none: that is what makes clean captions cheap.
"""

from __future__ import annotations

import functools
import html
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.common import personal_rules

if TYPE_CHECKING:
    from raphael.base.config.data import CaptionsConfig

MAX_PASSES = 8
MIN_FILE_WORDS = 3  # a file name of so many words is a title, of fewer a name

# Words that only lead to an address, and hang in the air without it.
_LEADING = r"orders?|contact|e-?mail(?: us)?|mail(?: to)?|visit|see|via|from|at|on|by|source|credit"
_LEAD = rf"(?:\b(?:{_LEADING})\b[ \t]*:?[ \t]*)?"
_PICTURE_FILE = r"jpe?g|png|gif|webp|bmp|tiff?|svg|psd|eps|heic|cr2|nef|pdf"
_DOMAIN_END = r"com|net|org|info|biz|edu|gov|shop|blog|co\.uk|com\.au|de|nl|fr|ru"
_BARE_DOMAIN = rf"(?:[a-z0-9-]+\.)*[a-z0-9-]{{2,}}\.(?:{_DOMAIN_END})(?![\w.-]*\w)"
_CONTROL = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffd"
_CAMERA = r"(?:IMG|DSC[NF]?|DCIM|PICT|MVI|GOPR|PXL|SAM|CIMG)[_-]?\d{3,}(?:_\d+)*"

# Words in angle brackets are a title more often than one thinks: only what HTML knows is a tag.
_TAGS = (
    "a|abbr|address|area|article|aside|audio|b|big|blockquote|body|br|button|caption|center|cite|code|col|dd|del|div|"
    "dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|"
    "label|legend|li|link|main|map|mark|meta|nav|nobr|noscript|object|ol|option|p|param|path|pre|q|s|script|section|"
    r"select|small|source|span|strike|strong|style|sub|sup|svg|table|tbody|td|textarea|tfoot|th|thead|title|tr|tt|u|"
    r"ul|video|wbr|o:\w+|st1:\w+"
)
_TAG = (
    r"<(script|style)\b[^<>]*>.*?</\1\s*>"  # what lies between these is no text
    r"|<!--.*?-->|<![a-z][^<>]*>"
    rf"|<(?:{_TAGS})(?:\s[^<>]*|/)?>|</[a-z][^<>]*>|<[a-z][^<>]*=[^<>]*>"
    rf"|</?(?:{_TAGS})(?:\s+[\w-]+\s*=[^<>]*)?/?\s*$"  # cut off in the middle
)

_STOCK_PICTURE = r"stock[ -](?:photos?|photography|photographs?|images?|pictures?|pics?)\b"
_STOCK = (
    rf"^(?:royalty[ -]free\s+)?{_STOCK_PICTURE}(?:\s*[:–—-]|\s+of\b)?"  # "Stock Photo: ", "Stock photo of"
    rf"|\b(?:royalty[ -]free\s+)?(?:editorial\s+)?{_STOCK_PICTURE}(?=\s*(?:$|[^\w\s]))"
    r"|\s[–—-]\s*stock (?:videos?|vectors?|illustrations?|footage)\s*$"
    r"|\broyalty[ -]free(?:\s+(?:photos?|images?|pictures?))?\b"
    r"|\bstock[ -](?=(?:footage|videos?|vectors?|illustrations?|clip ?art)\b)"  # the medium stays
    r"|\bstock ?fotos?\b|\bstock ?fotografie\b|\b(?:fotos?|imagens?|imagen) de stock\b|\bphotos? libres? de droits?\b"
)
_AGENCIES = r"shutterstock|getty images|istock ?photos?|istock|alamy|dreamstime|depositphotos|123rf|adobe stock|fotolia"
_CREDIT = (
    r"\((?:(?:photo|image|picture|illustration)s?(?: credit| courtesy)?(?: by|:)|(?:photo )?credit|courtesy|ap photo"
    rf"|afp photo|reuters|{_AGENCIES}|©|\(c\)|copyright)\b[^()]*\)|\(\s*©[^()]*\)"
    rf"|\s[|•·–—-]+\s*(?:(?:{_AGENCIES})(?:[\s.]+(?:vectors?|photos?|images?))?|photodune item for sale)\s*$"
    r"|\b(?:reuters|ap photo|afp photo)/[\w /.-]*$"
)
_CREDIT_WORDS = (
    "(photo (image (picture (illustration (ap (afp credit courtesy copyright reuters © (c) shutterstock getty istock "
    "alamy dreamstime depositphotos 123rf adobe fotolia photodune photo/ stock"
)
_OTHER_BOILERPLATE = (
    r"\s*•\s*instagram photos and videos|^(?:file|image|datei|fichier):\s*|\|\s*price: \d+ credits?\s*(?:\([^()]*\))?"
    r"|\s*[-–—]\s*(?:premium )?royalty[ -]free, artist: .*$|\s+[-–—]\s*(?:jpe?g|png)\s*$"
    r"|\s*[-–—]\s*read the full (?:text|story|article)\s*$|\s*pictures & photos\s*$"
)

_OTHER_WORDS = "instagram file: image: datei: fichier: price: read photos royalty jpg jpeg png"

# Numbers only: 14/05/2016, 05.09.17, 2016-05-14 12:30. "1.1.30" is a version, "May 18, 2019" is words.
_DATE_GATE = r"\d[/.-]\d{1,2}[/.-]\d"
_DATE = (
    r"(?:\b(?:dated|on)\s+)?(?<![\w./-])(?:\d{1,2}/\d{1,2}/(?:\d{4}|\d{2})|\d{1,2}([.-])\d{1,2}\1(?:19|20)\d{2}|\d{2}\.\d{2}\.\d{2}"
    r"|(?:19|20)\d{2}([./-])\d{1,2}\2\d{1,2})(?:[t ]\d{1,2}:\d{2}(?::\d{2})?)?(?![\w/-]|\.\d)"
)
_LABELLED_ID = (
    r"\b(?:(?:mls|ref|sku|item|style|listing ?id|id|isbn|art)(?:\(r\)|®)?\.?(?: no\.?)?\s*[:#][:#\s]*)\w*\d[\w-]*"
    r"|\b(?<!stock )(?:image|photo|code|serial)\s*[:#][:#\s]*\d[\d/-]{4,}"
    r"|#\s?[a-z]?\d{4,}\b"
)
_LONG_NUMBER = (
    r"(?<![\w$€£.,-])(?!\d*0000\b)\d{6,}(?:-\d+)?\b(?![.,]\d)"  # 9780340829752, not 1000000
    r"|^\d{3,4}x\d{3,4}(?=\s)"  # pixels
)
_HASH = re.compile(r"\b(?=(?:[a-f]*\d){3})(?=\d*[a-f])[0-9a-f]{8,}\b")  # lower case only
_SLUG = re.compile(r"[\w'&,]+(?:-[\w'&,]+)*-?")
_UNDERSCORES = re.compile(r"(?<=[^\W_])_+(?=[^\W_])|(?<=\s)_+|_+(?=\s)")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_SINGLE = frozenset("–—®™°•éèüöäñçáíóúß€£")  # mojibake of one character it is none: two at least belong together
_CONTROLS = re.compile(rf"[{_CONTROL}]+")


@dataclass(frozen=True)
class Cleaned:
    """text: the clean caption, None where nothing describes an image; reasons: the rules that changed it, in order,
    and last the reason for None."""

    text: str | None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """A rule's name and what it does. It is asked where the lower-cased caption has one of `chars`, one of `words` and
    a match of `gate`; an empty trigger is always met."""

    name: str
    apply: Callable[[str], str]
    chars: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()
    gate: Callable[[str], object] | None = None

    def is_asked(self, lower: str) -> bool:
        """Whether a word and the gate are there; whether one of the characters is, `RuleIndex` has seen to."""
        for word in self.words:
            if word in lower:
                break
        else:
            if self.words:
                return False
        return self.gate is None or self.gate(lower) is not None


def _rule(
    name: str, what: str | Callable[[str], str], to: object = " ", chars: str = "", words: str = "", gate: str = ""
) -> Rule:
    if isinstance(what, str):
        what = functools.partial(re.compile(what, re.IGNORECASE | re.DOTALL).sub, to)
    return Rule(name, what, frozenset(chars), tuple(words.split()), re.compile(gate).search if gate else None)


def _fix_encoding(text: str) -> str:
    """Mojibake, by ftfy, without expanding ligatures."""
    if text.isascii() or _SINGLE.issuperset(_NOT_ASCII.findall(text)):
        return text
    import ftfy  # 50 us a caption

    fixed = ftfy.fix_text(text, unescape_html=False, fix_latin_ligatures=False)
    return fixed if len(fixed) <= len(text) else text


def _controls(text: str) -> str:
    return text if text.isascii() and text.isprintable() else _CONTROLS.sub(" ", text)


def _csv_quotes(text: str) -> str:
    """A cell of a CSV file that was never read as one: "a ""word"" so"."""
    inside = text[1:-1]
    if len(text) > 1 and text[0] == text[-1] == '"' and '""' in inside and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return text


def _file_words(match: re.Match) -> str:
    """The words of a file name that is a sentence ("eco-cotton-culottes.jpg"); a blank for a mere name."""
    stem = match[0].rpartition(".")[0]
    words = re.findall(r"[^\W\d_]{3,}", stem)
    is_title = len(words) >= MIN_FILE_WORDS and "/" not in stem and not re.search(_CAMERA, stem, re.IGNORECASE)
    return re.sub(r"[-_+]|%20", " ", stem) if is_title else " "


def _slug(text: str) -> str:
    """tp-link-powerline-kit: a whole caption in one piece. Underscores are blanks anywhere."""
    if " " not in text and text.count("-") + text.count("_") > 1 and _SLUG.fullmatch(text):
        return text.replace("-", " ").replace("_", " ")
    return _UNDERSCORES.sub(" ", text)


def _repeated(text: str) -> str:
    for char in _TRIPLED.intersection(text):
        if char * 3 in text:
            text = re.sub(rf"{re.escape(char)}{{3,}}", "..." if char == "." else char, text)
    return text


def _spaces(text: str) -> str:
    return " ".join(text.split())


_ENDS = " \t,;:|/\\_~=+•·–—-"


def _trim(text: str) -> str:
    text = text.strip(_ENDS)
    if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        return text[1:-1]
    return text


_ENTITY = r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});|&(?:amp|quot|lt|gt|nbsp)\b"
_FILE_GATE, _DOMAIN_GATE = rf"\.(?:{_PICTURE_FILE})", rf"\.(?:{_DOMAIN_END})"
_DIGITS = "0123456789"
_TRIPLED = frozenset(string.punctuation.replace("+", "") + "…·•★☆♥。！？、–—")

# The order matters: entities hide tags, tags hide addresses.
RULES: tuple[Rule, ...] = (
    _rule("doubled quote", _csv_quotes, chars='"'),
    _rule("escaped quote", r"\\+(?=['\"])", "", chars="\\"),
    _rule("entity", _ENTITY, lambda match: html.unescape(match[0]), chars="&"),
    _rule("bidi control", functools.partial(personal_rules.BIDI_CONTROLS.sub, ""), chars=personal_rules.BIDI_CHARS),
    _rule("control character", _controls),
    _rule("encoding", _fix_encoding),
    _rule("tag", _TAG, chars="<"),
    _rule("tag", r"\[(url|img|size|color|quote|b|i|u)(?:=[^\[\]]*)?\](.*?)\[/\1\]", r"\2", chars="["),
    _rule("e-mail", _LEAD + r"(?:mailto:)?[\w.+%-]+@[\w-]+(?:\.[\w-]+)+", chars="@"),
    _rule("url", _LEAD + r"(?:(?:https?|ftp):/*|\bwww\.)[^\s<>\"')\]]*", words="http ftp: www."),
    _rule("url", r"\bhttps? t co \w+", words="http"),  # short links without their punctuation
    # a title with an ending: keep it
    _rule("file name", rf"(?<=\w )([a-z]{{2,}})\.(?:{_PICTURE_FILE})(?=$)", r"\1", chars=".", gate=_FILE_GATE),
    _rule("file name", rf"[^\s\"'()<>\[\],|]*\.(?:{_PICTURE_FILE})(?!\w)", _file_words, chars=".", gate=_FILE_GATE),
    _rule("url", rf"{_LEAD}(?<![\w.@]){_BARE_DOMAIN}(?:/[^\s<>\"')\]]*)?(?:['’]s\b)?", chars=".", gate=_DOMAIN_GATE),
    _rule("camera code", rf"\b{_CAMERA}\b", chars=_DIGITS, words="img dsc dcim pict mvi gopr pxl sam cimg"),
    _rule("file name", r"\b\w*_zps\w{6,}\b", words="_zps"),
    _rule("handle", _LEAD + r"(?<!\w)@\w[\w.]*(?:['’]s\b)?|@", chars="@"),
    _rule("hashtag", r"(?<!\w)#(?=[^\W\d])(?![a-z]\d{4})", "", chars="#"),
    *(Rule(name, apply, frozenset(_DIGITS), gate=gate) for name, apply, gate in personal_rules.RULES),
    _rule("date", _DATE, chars=_DIGITS, gate=_DATE_GATE),
    _rule("id", _LABELLED_ID, chars=":#", gate=r"\d"),
    _rule("id", _LONG_NUMBER, chars=_DIGITS, gate=r"\d{6}|^\d+x"),
    _rule("id", functools.partial(_HASH.sub, " "), chars=_DIGITS, gate=r"[0-9a-f]{8}"),
    _rule("credit", _CREDIT, chars="(|•·–—-/", words=_CREDIT_WORDS),
    _rule("stock boilerplate", _OTHER_BOILERPLATE, words=_OTHER_WORDS),
    _rule("stock boilerplate", _STOCK, words="stock royalty libre"),
    _rule("shop boilerplate", r"^(?:buy|shop) (.+) online$", r"\1", words="online"),
    _rule("slug", _slug, chars="-_"),
    _rule("angle bracket", r"[<>]+", chars="<>"),
    _rule("doubled quote", r'"{2,}', '"', words='""'),
    _rule("emphasis", r"\*+(?=\s|$)|(?<!\w)\*+", "", chars="*"),
    _rule("empty brackets", r"\(\s*\)|\[\s*\]|\{\s*\}", chars="([{"),
    _rule("ellipsis", r"^\s*(?:\.{2,}|…)|\s*(?:\.{2,}|…|\[(?:…|\.{3})\])\s*$", words=".. …"),
    _rule("repeated punctuation", _repeated),
    _rule(
        "left-over punctuation",
        r"\s+[-–—|](?=\s+[-–—|,]|,)|,(?=\s*,|\s*\.(?:\s|$)|\s+[-–—|]\s)|\s+(?=[.,](?:\s|$))",
        "",
        chars="-–—|,.",
    ),
    _rule("space", _spaces),
    _rule("ends", _trim),
)


class RuleIndex:
    """Which rules can match a caption at all, by the characters in it: most are never asked, and a look-up of all of
    them at once costs a tenth of asking each."""

    def __init__(self, rules: tuple[Rule, ...]):
        self.always = self._bits(number for number, rule in enumerate(rules) if not rule.chars)
        triggers = {char for rule in rules for char in rule.chars}
        self.by_char = {char: self._bits(n for n, rule in enumerate(rules) if char in rule.chars) for char in triggers}
        self.triggers = frozenset(triggers)
        self.numbered = tuple(enumerate(rules))
        self.known: dict[int, tuple[tuple[int, Rule], ...]] = {}

    @staticmethod
    def _bits(numbers: Iterable[int]) -> int:
        return sum(1 << number for number in numbers)

    def rules(self, lower: str) -> tuple[tuple[int, Rule], ...]:
        """(number, rule) in the rules' order."""
        bits = self.always
        for char in self.triggers.intersection(lower):
            bits |= self.by_char[char]
        found = self.known.get(bits)
        if found is None:
            found = self.known[bits] = tuple(pair for pair in self.numbered if bits >> pair[0] & 1)
        return found


RULE_INDEX = RuleIndex(RULES)
_CHEAP = ("space", "ends", "left-over punctuation")  # not worth a line in a report
_FILE_RULES = {"file name", "camera code"}
_WORD = re.compile(r"[^\W\d_]")

# What most captions are made of, and what in it would still ask for a rule. A test compares with the rules themselves.
_ORDINARY = re.compile(r"[A-Za-z0-9 ',.!?&:()/-]+")
_WORDY = ("http", "www.", "ftp:", "stock", "royalty", "libre")
_STARTS = ("file:", "image:", "datei:", "fichier:", "buy ", "shop ")
_ODD_PAIR = re.compile(
    r"  | [,.]|\.[\w.]|,[,.-]|, -|-[,-]|- [,-]|:[:/]|/[:/]|!!|\?\?|\(\(|\)\)|\( ?\)|''|&[a-z&]", re.IGNORECASE
)
_ODD_WORD = re.compile(
    r"\((?:photo|image|picture|illustration|ap photo|afp photo|c\)|credit|courtesy|copyright|reuters|shutter|getty"
    r"|alamy|dreamstime|depositphotos|123rf|adobe|fotolia)|/photo|- ?(?:shutter|getty|alamy|dreamstime|depositphotos"
    r"|123rf|adobe|fotolia|photodune|read|jpe?g|png)|& photos|(?:reuters|photo)/"
)
_NUMBERED = re.compile(
    r"[0-9]{6}|[0-9a-f]{8}|[:/]|[0-9][-.][0-9]|(?:img|dsc|dcim|pict|mvi|gopr|pxl|sam|cimg)[nf]?-?[0-9]|^[0-9]+x"
)
_DIGIT = re.compile("[0-9]")


def _is_ordinary(text: str) -> bool:
    """Whether no rule would change this caption; never wrong where it says yes."""
    if not _ORDINARY.fullmatch(text) or " " not in text or text[0] in _ENDS or text[-1] in _ENDS:
        return False
    lower = text.lower()
    for word in _WORDY:
        if word in lower:
            return False
    if lower.startswith(_STARTS) or _ODD_PAIR.search(text):
        return False
    if ("(" in text or "-" in text or "/" in text or "&" in text) and _ODD_WORD.search(lower):
        return False
    return not (_DIGIT.search(text) and (_NUMBERED.search(lower) or personal_rules.may_have_one(lower)))


def _once(text: str, reasons: dict[str, None]) -> str:
    """The caption after each rule was asked once, in order; the names of those that changed it join `reasons`."""
    next_rule, lower = 0, text.lower()
    while True:
        for number, rule in RULE_INDEX.rules(lower):
            if number < next_rule or not rule.is_asked(lower):
                continue
            changed = rule.apply(text)
            if changed != text:
                reasons[rule.name] = None
                text, lower, next_rule = changed, changed.lower(), number + 1
                break  # what is left of the plan is another one now
        else:
            return text


def clean(text: str) -> Cleaned:
    """The caption without what is no description of an image, and why it was changed.

    None (with the reason "only a file name", "no words" or "too short": one Latin letter) where nothing is left.
    """
    reasons: dict[str, None] = {}
    for _ in range(MAX_PASSES):
        if _is_ordinary(text):
            break
        before = text
        text = _once(text, reasons)
        if text == before:
            break
    else:
        return Cleaned(None, (*reasons, "never clean"))
    shown = tuple(name for name in reasons if name not in _CHEAP)
    if not _WORD.search(text):
        return Cleaned(None, (*shown, "only a file name" if _FILE_RULES & set(shown) else "no words"))
    if len(text) == 1 and text.isascii():
        return Cleaned(None, (*shown, "too short"))
    return Cleaned(text, shown)


def drop_reason(cleaned: Cleaned, config: CaptionsConfig) -> str | None:
    """Why a cleaned caption's image is dropped; None where it stays."""
    if cleaned.text is None:
        return cleaned.reasons[-1]
    if len(cleaned.text) < config.min_chars:
        return "too short"
    return "too long" if len(cleaned.text) > config.max_chars else None
