"""A table of token vectors with the rows of a small vocabulary, and one row that all other tokens share.

CLIP's table has 49,408 rows and is most of a small text encoder; captions of a closed vocabulary use a few hundred. The
others never had a gradient, so each is as good as any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

TABLE = "token_embedding.weight"  # as open_clip's CLIP names it
ROWS, IDS = "token_embedding.rows", "token_embedding.ids"


def shared_table(tensors: dict[str, Tensor], ids: list[int]) -> dict[str, Tensor]:
    """`tensors` with ROWS (len(ids) + 1, dim) and IDS (len(ids),) in place of TABLE (vocabulary, dim).

    The shared row, the last, is that of the lowest id that is not in `ids`: a row as the training left it, which a text
    encoder has seen the like of in no caption, but in size and spread. Of a table that shares a row already the same
    comes out again, to the byte. Raises ValueError where ids are none, repeated or outside the table.
    """
    table, kept = tensors[TABLE], sorted(ids)
    others = sorted(set(range(len(table))).difference(kept))
    if not kept or len(set(kept)) < len(kept) or kept[0] < 0 or kept[-1] >= len(table) or not others:
        raise ValueError(f"got {len(kept)} token ids, expected different ones of 0 to {len(table) - 1}, not all")
    rest = {name: tensor for name, tensor in tensors.items() if name != TABLE}
    return {**rest, ROWS: table[[*kept, others[0]]].clone(), IDS: torch.tensor(kept, dtype=torch.int32)}


def whole_table(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """`tensors` with TABLE (size, dim) again; as they are where nothing is shared. Raises ValueError for a wrong id."""
    if ROWS not in tensors:
        return tensors
    rows, ids = tensors[ROWS], tensors[IDS].long()
    if len(rows) != len(ids) + 1 or len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ValueError(f"{len(rows)} rows of tokens for {len(ids)} ids, expected one more, ids below {size}")
    table = rows[-1].repeat(size, 1)
    table[ids] = rows[:-1]
    return {**{name: tensor for name, tensor in tensors.items() if name not in (ROWS, IDS)}, TABLE: table}
