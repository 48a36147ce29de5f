"""What `select` asks of columns of texts: a string is gone through by itself only where its bytes' number, its ends or
the cheaper of two expressions leave a doubt. Every function gives what going through all of them gives.

Columns are pyarrow arrays of type string, sliced or not, nulls allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# Scheme and host only; the gateway judges the rest when it knows where the name leads.
URL_PATTERN = r"(?i)^https?://[^\s/?#\\@]+([/?#]|$)"
PLAIN_URL = r"^https?://[^\s/?#\\@]+[/?#]"  # what matches this matches that; letters of one case cost a fifth less


def char_counts(texts: pa.Array, low: int, high: int) -> np.ndarray:
    """Characters of each text without white space around it, int32 (n,), as far as `low` and `high` ask: exact
    outside of [low, high], within it perhaps the bytes instead. A null has none.

    UTF-8 takes one to four bytes a character, so few texts have to be gone through.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    counts = pc.fill_null(pc.binary_length(texts), 0).to_numpy()
    unsure = np.flatnonzero((counts < 4 * low) | (counts > high) | may_have_space(texts))
    if len(unsure):
        exact = pc.utf8_length(pc.utf8_trim_whitespace(texts.take(pa.array(unsure))))
        counts = counts.copy()
        counts[unsure] = pc.fill_null(exact, 0).to_numpy()
    return counts


def may_have_space(texts: pa.Array) -> np.ndarray:
    """Where a text may begin or end with white space, bool (n,): its first or last byte is no visible ASCII. Texts
    that are empty or null, which have neither, may be marked too."""
    import numpy as np

    _, offsets, content = texts.buffers()
    if content is None or not content.size:
        return np.zeros(len(texts), bool)
    data = np.frombuffer(content, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    first, last = (data.take(places, mode="clip") for places in (ends[:-1], ends[1:] - 1))
    return (first - np.uint8(33) > 94) | (last - np.uint8(33) > 94)  # of uint8: 32 - 33 is 255


def are_urls(texts: pa.Array) -> np.ndarray:
    """Where URL_PATTERN matches, bool (n,); a null is none."""
    import numpy as np
    import pyarrow as pa

    good = _matches(texts, PLAIN_URL)
    others = np.flatnonzero(~good)
    if len(others):
        good[others] = _matches(texts.take(pa.array(others)), URL_PATTERN)
    return good


def _matches(texts: pa.Array, pattern: str) -> np.ndarray:
    import pyarrow.compute as pc

    found = pc.match_substring_regex(texts, pattern).fill_null(False)
    return found.to_numpy(zero_copy_only=False).copy()  # a view of Arrow's bytes may be read-only
