"""What is told of images that were looked at: captions, images that look alike, sizes; and all of it as a text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ALIKE_BITS = 4  # of 64 that differ at most: filter.near_duplicate_bits for photographs
MOST_COMPARED = 50_000  # all with all: 16 s of one core there
SHOWN_PAIRS, SHOWN_WORDS, SHOWN_FIRST, LONG_WORDS = 10, 12, 8, 50
BLOCK = 2048
WORD = re.compile(r"[^\W\d_]+(?:'\w+)?")


def caption_facts(captions: Sequence[str]) -> dict[str, Any]:
    """Numbers of the captions of used images: words, lengths, repetitions."""
    if not captions:
        return {"number": 0}
    lengths = np.array([len(caption.split()) for caption in captions])
    words: Counter[str] = Counter()
    for caption in captions:
        words.update({word.lower() for word in WORD.findall(caption)})
    most, times = Counter(captions).most_common(1)[0]
    return {
        "number": len(captions),
        "different": len(set(captions)),
        "words": {"least": int(lengths.min()), "median": float(np.median(lengths)), "most": int(lengths.max())},
        f"above_{LONG_WORDS}_words": int((lengths > LONG_WORDS).sum()),
        "first": list(dict.fromkeys(captions))[:SHOWN_FIRST],
        "most_frequent": {"caption": most, "times": times},
        "words_in_most_captions": dict(words.most_common(SHOWN_WORDS)),
    }


def alike(names: Sequence[str], hashes: np.ndarray) -> dict[str, Any]:
    """Used images that look like an earlier one: how many, and the first pairs; none is left out for it unless
    filter.near_duplicate_bits says so."""
    if len(names) > MOST_COMPARED:
        return {"looked_for": False}
    count, pairs = 0, []
    for start in range(0, len(names), BLOCK):
        mine = hashes[start : start + BLOCK, None]
        first = np.full(len(mine), -1)
        for other in range(0, start + len(mine), BLOCK):
            theirs = hashes[other : other + BLOCK]
            near = np.bitwise_count(mine ^ theirs[None]) <= ALIKE_BITS
            near &= np.arange(other, other + len(theirs)) < np.arange(start, start + len(mine))[:, None]
            found = near.any(1) & (first < 0)
            first[found] = other + near[found].argmax(1)
        found = np.flatnonzero(first >= 0)
        count += len(found)
        pairs += [[names[first[place]], names[start + place]] for place in found[: SHOWN_PAIRS - len(pairs)]]
    return {"looked_for": True, "bits": ALIKE_BITS, "look_like_an_earlier_one": count, "pairs": pairs}


def buckets(sizes: Sequence[tuple[int, int]], wanted: Sequence[Sequence[int]]) -> dict[str, int]:
    """How many images each size gets, as `encode` would deal them out."""
    from raphael.base.images.sizes import nearest_sizes

    chosen = nearest_sizes(*np.array(sizes).T, wanted) if sizes else np.empty(0, np.int64)
    counts = np.bincount(chosen, minlength=len(wanted))
    return {f"{height}x{width}": int(count) for (height, width), count in zip(wanted, counts, strict=True)}


def text(found: dict[str, Any], out: Path) -> str:
    """For a person: a few lines."""
    lines = [f"{found['path']} ({found['kind']}): {found['used']:,} of {found['total']:,} captioned images are used"]
    for reason, count in sorted(found["dropped"].items(), key=lambda pair: -pair[1]):
        names = ", ".join(found["examples"].get(reason, []))
        lines.append(f"  {count:>7,}  {reason}" + (f": {names}" if names else ""))
    if "repeats" in found:
        lines.append("  in an epoch: " + ", ".join(f"{name} x {times}" for name, times in found["repeats"].items()))
    if found["handled"]:
        lines.append("handled: " + ", ".join(f"{count:,} {what}" for what, count in found["handled"].items()))
    captions = found["captions_of_used"]
    if captions["number"]:
        words = captions["words"]
        lines.append(
            f"captions: {captions['different']:,} different; {words['least']} to {words['most']} words, half have "
            f"{words['median']:g} or fewer; most often: {', '.join(captions['words_in_most_captions'])}"
        )
    lines.append("sizes: " + ", ".join(f"{count:,} of {name}" for name, count in found["buckets"].items()))
    near = found["duplicates"]
    if near.get("look_like_an_earlier_one"):
        pairs = "; ".join(" and ".join(pair) for pair in near["pairs"][:3])
        lines.append(f"{near['look_like_an_earlier_one']:,} look like an earlier one: {pairs}")
    lines.append(f"{out / 'contact.png'} shows some; {out / 'check.json'} has all of it")
    return "\n".join(lines)
