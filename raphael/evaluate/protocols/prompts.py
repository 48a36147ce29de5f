"""The prompts of a protocol, from the file that the public has them in, in the form of data/source/prompts.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raphael.base.stage import StageError, read_json
from raphael.evaluate.protocols.csv_tables import Table
from raphael.evaluate.protocols.protocol import Protocol


def protocol_prompts(protocol: Protocol, source: str | Path | None) -> list[dict[str, Any]]:
    """-> [{"prompt", "suite", "truth", "reference"}], one per image to generate; "seed" too where the table has one.

    source: the annotation file or table that protocol.captions speaks of; None for those that are complete in
    themselves. Raises StageError for a file that is absent, of another form or, where the protocol knows the list's
    hash, of another content.
    """
    rule = protocol.captions
    if rule.kind in ("any", "scenes"):
        raise StageError(f"{protocol.identity} has no prompt list of its own: {rule.rule}")
    if rule.kind == "product":
        rows = [
            (style.replace("{subject}", subject), "", "", style.replace("{subject}", "").strip(" ,"))
            for style in rule.styles
            for subject in rule.subjects
        ]
    elif source is None:
        raise StageError(f"{protocol.identity}: got no --source, expected the file with its prompts: {rule.rule}")
    elif rule.kind == "coco_annotations":
        rows = [(text, str(number), "", "coco") for number, text in lowest_captions(read_json(source), source)]
        rows.sort(key=lambda row: hashlib.sha256(f"{rule.draw_seed}:{row[1]}".encode()).digest())
    else:
        rows = _table(protocol, Path(source))
    if rule.count:
        if len(rows) < rule.count:
            raise StageError(f"{source}: got {len(rows):,} prompts, {protocol.identity} takes {rule.count:,}")
        rows = rows[: rule.count]
    prompts = [
        {
            "prompt": text,
            "suite": category or protocol.name,
            "truth": None,
            "reference": number or None,
            **({"seed": int(seed)} if seed else {}),
        }
        for text, number, seed, category in rows
    ]
    digest = list_sha256(prompts)
    if rule.list_sha256 and digest != rule.list_sha256:
        raise StageError(
            f"{source}: its list has sha256 {digest[:16]}, {protocol.identity} is defined on {rule.list_sha256[:16]}; "
            f"take the file that the protocol names: {rule.rule}"
        )
    return prompts


def list_sha256(prompts: Iterable[dict[str, Any]]) -> str:
    """Over every entry's prompt, and seed where it has one of its own, in order: what images.json tells too."""
    digest = hashlib.sha256()
    for entry in prompts:
        digest.update(json.dumps([entry["prompt"], entry.get("seed")], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def lowest_captions(annotations: Any, source: str | Path) -> list[tuple[int, str]]:
    """[(image id, the caption of its lowest annotation id)] by image id, from COCO's captions JSON."""
    try:
        rows = sorted((entry["image_id"], entry["id"], entry["caption"]) for entry in annotations["annotations"])
    except (KeyError, TypeError):
        raise StageError(
            f"{source}: not COCO's captions JSON, expected annotations: [{{image_id, id, caption}}]"
        ) from None
    lowest: dict[int, str] = {}
    for image_id, _, caption in rows:
        lowest.setdefault(image_id, " ".join(caption.split()))
    return sorted(lowest.items())


def _table(protocol: Protocol, source: Path) -> list[tuple[str, str, str, str]]:
    rule = protocol.captions
    reader = Table(source, f"the table with the prompts: {rule.rule}", tabs=rule.separator == "tab")
    wanted = [rule.prompt_column, rule.id_column, rule.seed_column, rule.category_column]
    reader.need(*filter(None, wanted))
    rows = []
    for number, row in enumerate(reader, 1):
        cells = [" ".join((row[name] or "").split()) if name else "" for name in wanted]
        if not cells[0]:
            raise StageError(f"{source}: row {number} has no {rule.prompt_column}")
        if cells[2] and not cells[2].isdigit():
            raise StageError(f"{source}: row {number}: got the seed {cells[2]!r}, expected a whole number")
        rows.append((cells[0], cells[1], cells[2], cells[3]))
    return rows
