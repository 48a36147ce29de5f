"""What becomes of a file on the way from a stranger: cut, empty, flipped, or made to hurt; and what a program may say
to it: a line, never a traceback.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEEP = "[" * 100_000
SAID_CHARS = 2000  # of an error: one line that a person can read
JSON_VALUES: list[Any] = [None, 0, -1, 10**400, 1e308, float("nan"), "", "x" * 100_000, [], [[]], {}, {"x": {}}, True]


def damaged(data: bytes, rng: random.Random, flips: int = 8) -> Iterator[tuple[str, bytes]]:
    """(what was done, the file) of any form: as it lies there after a power cut, a bad disk, a download that broke."""
    yield "empty", b""
    yield "half of it", data[: len(data) // 2]
    yield "all but a byte", data[:-1]
    yield "one byte more", data + b"\0"
    yield "zeros of its length", bytes(len(data))
    for _ in range(flips):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        yield f"a flipped bit, {place}.{bit}", bytes(flipped)


def safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def hostile_safetensors(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Headers that lie, of a file that was whole."""
    header, body = parsed(data)
    text = json.dumps(header).encode()
    name = next(key for key in header if key != "__metadata__")
    yield "a header of 2^63 bytes", safetensors(text, body, 1 << 63)
    yield "a header of 100 MB less than there are", safetensors(text, body, 100 << 20)
    yield "a header of 100,000 brackets", safetensors(DEEP.encode(), body)
    yield "brackets in a header's entry", safetensors(b'{"a":' + DEEP.encode() + b"}", body)
    yield "a header that is a list", safetensors(b"[]", body)
    yield "a header without tensors", safetensors(b"{}")
    changes = {
        "offsets beyond the file": {"data_offsets": [0, 1 << 40]},
        "offsets turned round": {"data_offsets": [64, 0]},
        "negative offsets": {"data_offsets": [-8, 0]},
        "a shape of 2^62 numbers": {"shape": [1 << 31, 1 << 31]},
        "a shape whose product overflows": {"shape": [1 << 33, 1 << 33]},
        "a shape of nothing": {"shape": [0]},
        "a negative shape": {"shape": [-1]},
        "a type that there is not": {"dtype": "F31"},
        "numbers of another type": {"dtype": "I32"},
    }
    for what, change in changes.items():
        yield what, safetensors(json.dumps({**header, name: {**header[name], **change}}).encode(), body)
    renamed = {("x" * 1_000_000 if key == name else key): value for key, value in header.items()}
    yield "a name of a million letters", safetensors(json.dumps(renamed).encode(), body)
    for odd in ("../../outside", "/etc/passwd", "a\0b", "a\nb", "\u202egnp.exe", "<script>alert(1)</script>"):
        renamed = {(odd if key == name else key): value for key, value in header.items()}
        yield f"a tensor called {odd!r}", safetensors(json.dumps(renamed).encode(), body)


def hostile_json(text: str, rng: random.Random, most: int = 40) -> Iterator[tuple[str, str]]:
    """Every kind of text in place of JSON, and of values in it; `most` of these, by chance."""
    yield from (("nothing", ""), ("null", "null"), ("a number", "7"), ("a list", "[]"), ("an empty mapping", "{}"))
    yield from (("brackets, 100,000 deep", DEEP), ("a number of 5,000 digits", '{"a": ' + "9" * 5000 + "}"))
    yield from (("no UTF-8", "\udcff{"), ("NaN", "NaN"), ("a text", '"x"'))
    places = list(_places(json.loads(text)))
    cases = [(path, value) for path in places for value in (*JSON_VALUES, _GONE)]
    for path, value in rng.sample(cases, min(most, len(cases))):
        yield f"{'.'.join(map(str, path))}: {str(value)[:30]}", json.dumps(_changed(json.loads(text), path, value))


_GONE = object()


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _changed(whole: Any, path: tuple, value: Any) -> Any:
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if value is _GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return whole


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))


def kind(what: str) -> str:
    """For the table: without the place."""
    return what.partition(",")[0][:40]


def ended_in_a_line(act: Callable[[], int], capsys: Any) -> str:
    """What a command made of it: "taken", or its one line of an error. Any exception that leaves it is a failure."""
    capsys.readouterr()
    status = act()
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if "error: " in line]
    assert "Traceback" not in said.err, said.err
    if status == 0:
        return "taken"
    assert status == 1 and len(errors) == 1, (status, said.err[-2000:])
    assert len(errors[0]) < SAID_CHARS, errors[0][:300]
    return "refused in a line"
