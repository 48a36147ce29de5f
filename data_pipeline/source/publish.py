"""The drawn corpus as it would lie on the web: a link list like LAION's, and a site that is partly broken.

KINDS is the whole table of what goes wrong. `source.scenes.bad_share` is the share of all rows that have something
wrong; the weights say how that share is divided. Every row's fault is written to data/source/truth.parquet, so that
the report of the funnel can be checked against it.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.source import scene_captions, scene_drawing, scenes
from raphael.base.config.params import Config
from raphael.base.files import written_whole

HOST = "scenes.invalid"  # .invalid resolves nowhere (RFC 6761): only the configured gateway knows it
BEHAVIOURS = "behaviours.json"  # in site.zip: path -> "stall" or "cut"
CHUNK_ROWS = 250


@dataclass(frozen=True)
class Kind:
    """One way in which a row is bad: its weight within bad_share, and where the pipeline should notice."""

    weight: float
    noticed: str  # "download", "filter", "select", "captions" (dropped there) or "cleaned" (kept, with a clean caption)


KINDS: dict[str, Kind] = {
    "missing": Kind(0.16, "download"),  # 404
    "stall": Kind(0.015, "download"),  # the server never answers; each costs download.timeout_s
    "cut": Kind(0.04, "download"),  # the connection closes in the middle of the body
    "truncated": Kind(0.05, "download"),  # half a PNG, served as if it were whole
    "not_an_image": Kind(0.07, "download"),  # an HTML page with status 200
    "file_name_caption": Kind(0.05, "captions"),  # IMG_20190412_0042.JPG
    "empty_caption": Kind(0.03, "select"),
    "html_caption": Kind(0.07, "cleaned"),
    "entity_caption": Kind(0.05, "cleaned"),
    "url_caption": Kind(0.05, "cleaned"),
    "email_caption": Kind(0.04, "cleaned"),
    "no_score": Kind(0.08, "filter"),  # a null score, or all of them
    "watermark": Kind(0.08, "filter"),  # drawn over the image, pwatermark high
    "low_score": Kind(0.08, "filter"),  # AESTHETIC_SCORE below 4.7
    "unsafe": Kind(0.03, "filter"),  # the score only; the images are what they are
    "same_url": Kind(0.05, "select"),
    "same_picture": Kind(0.05, "filter"),  # the same bytes under another address
    "tiny": Kind(0.03, "filter"),
    "banner": Kind(0.02, "filter"),  # 4:1
}


@dataclass(frozen=True)
class Row:
    """What one row becomes: its line in the list, its file on the site, the truth about it."""

    metadata: dict[str, Any]
    files: dict[str, bytes]  # path on the site -> body
    behaviours: dict[str, str]
    truth: dict[str, Any]


def faults(seed: int, num_rows: int, bad_share: float) -> list[str | None]:
    """For each row the name of its fault, or None.

    Shares are met to the row; row 0 is good (a duplicate needs a model).
    """
    total = sum(kind.weight for kind in KINDS.values())
    budget = min(round(num_rows * bad_share), max(num_rows - 1, 0))
    exact = {name: budget * kind.weight / total for name, kind in KINDS.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(KINDS, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    names: list[str | None] = [name for name, count in counts.items() for _ in range(count)]
    names += [None] * (num_rows - 1 - len(names))
    random.Random(f"{seed}/faults").shuffle(names)
    return [None, *names][:num_rows]


def published_row(config: Config, row: int, fault: str | None, model_row: int) -> Row:
    """Row number `row`. model_row: the good row that a duplicate repeats."""
    seed, settings = config.seed, config.source.scenes
    rng = random.Random(f"{seed}/publish/{row}")
    original = model_row if fault in ("same_url", "same_picture") else row
    sides, shares = (settings.min_side_px, settings.max_side_px), vars(settings.shares)
    scene = scenes.scene_of_row(seed, original, sides, settings.heldout_share, shares)
    text, stated = scene_captions.caption(scene, random.Random(f"{seed}/caption/{row}"))
    path = site_path(seed, row)
    files: dict[str, bytes] = {}
    behaviours: dict[str, str] = {}
    if fault == "same_url":
        path = site_path(seed, original)
        width = height = scene.side_px
    else:
        image = _spoilt_image(scene_drawing.draw(scene), fault, rng)
        width, height = image.size
        if fault == "truncated":
            path = path.rsplit(".", 1)[0] + ".png"
        body = encode(image, (site_path(seed, original) if fault == "same_picture" else path).rsplit(".", 1)[1])
        if fault == "truncated":
            body = body[: len(body) // 2]
        if fault == "not_an_image":
            body = b"<!doctype html><title>Gone</title><p>This picture has moved to another address.\n"
        if fault in ("stall", "cut"):
            behaviours[path] = fault
        if fault != "missing":
            files[path] = body
    metadata = {
        "URL": f"http://{HOST}/{path}",
        "TEXT": _spoilt_caption(text, fault, rng),
        "WIDTH": width,
        "HEIGHT": height,
        **_scores(fault, rng),
    }
    truth = {"id": row, "url": metadata["URL"], "caption": text, "fault": fault or "", "truth": json.dumps(stated)}
    return Row(metadata, files, behaviours, truth)


def site_path(seed: int, row: int) -> str:
    rng = random.Random(f"{seed}/path/{row}")
    return f"{rng.choice('abcdefgh')}/{row:06d}.{rng.choices(('png', 'jpg', 'webp'), (0.6, 0.28, 0.12))[0]}"


def encode(image, extension: str) -> bytes:
    """The file's bytes: PNG, JPEG (quality 95, full colour resolution) or lossless WebP."""
    stream = io.BytesIO()
    if extension == "jpg":
        image.save(stream, "JPEG", quality=95, subsampling=0)
    elif extension == "webp":
        image.save(stream, "WEBP", lossless=True, method=0, quality=20)
    else:
        image.save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def _scores(fault: str | None, rng: random.Random) -> dict[str, float | None]:
    scores: dict[str, float | None] = {
        "similarity": round(min(max(rng.gauss(0.33, 0.025), 0.28), 0.45), 4),
        "punsafe": round(0.4 * rng.random() ** 4, 6),
        "pwatermark": round(0.45 * rng.random() ** 2, 6),
        "AESTHETIC_SCORE": round(min(max(rng.gauss(5.6, 0.4), 4.75), 7.5), 4),
    }
    if fault == "low_score":
        scores["AESTHETIC_SCORE"] = round(rng.uniform(2.5, 4.65), 4)
    if fault == "watermark":
        scores["pwatermark"] = round(rng.uniform(0.6, 0.99), 6)
    if fault == "unsafe":
        scores["punsafe"] = round(rng.uniform(0.6, 0.99), 6)
    if fault == "no_score":
        names = rng.choice((("AESTHETIC_SCORE",), ("pwatermark",), ("punsafe", "pwatermark"), tuple(scores)))
        scores.update(dict.fromkeys(names))
    return scores


def _spoilt_image(image, fault: str | None, rng: random.Random):
    from PIL import Image, ImageDraw, ImageFont

    side = image.size[0]
    if fault == "watermark":
        layer = Image.new("RGBA", image.size)
        pen, font = ImageDraw.Draw(layer), ImageFont.load_default(max(9, side // 7))
        for y in range(-side // 8, side, side // 3):
            pen.text((rng.randint(-side // 4, 0), y), "SAMPLE  SAMPLE", fill=(255, 255, 255, 130), font=font)
        return Image.alpha_composite(image.convert("RGBA"), layer.rotate(20)).convert("RGB")
    if fault == "tiny":
        return image.resize((rng.choice((12, 16, 24)),) * 2)
    if fault == "banner":
        return image.resize((4 * side, side))
    return image


def _spoilt_caption(text: str, fault: str | None, rng: random.Random) -> str:
    number = rng.randrange(10000)
    if fault == "html_caption":
        return rng.choice(("<p>{0}</p>", "<b>{0}</b><br/>", '<a href="/gallery/{1}">{0}</a>')).format(text, number)
    if fault == "entity_caption":
        return rng.choice(("&quot;{0}&quot;", "{0} &amp; more", "{0}&nbsp;")).format(text)
    if fault == "url_caption":
        return rng.choice(
            ("{0} https://shop.example/item/{1}", "{0} - www.pictures.example", "{0} | http://example.org/{1}.html")
        ).format(text, number)
    if fault == "email_caption":
        return rng.choice(("{0}, orders: painter{1}@studio.example", "{0} (contact sales{1}@prints.example)")).format(
            text, number
        )
    if fault == "file_name_caption":
        return rng.choice(("IMG_2019{0:04d}.JPG", "DSC{0:05d}.jpg", "untitled-{0}.png", "scan_{0:04d}.jpeg")).format(
            number
        )
    if fault == "empty_caption":
        return rng.choice(("", " ", "-"))
    return text


# ---- rendering in parallel, in restartable pieces ------------------------------------------------------------------


def piece_files(folder: Path, first: int) -> tuple[Path, Path]:
    return folder / f"{first:08d}.zip", folder / f"{first:08d}.json"


def render_chunk(config: Config, first: int, last: int, folder: Path) -> tuple[Path, Path]:
    """Rows first..last-1 as one piece on disk.

    `<first>.zip` (site files) and `<first>.json`, the rows.
    """
    site, rows = piece_files(folder, first)
    settings = config.source.scenes
    names = faults(config.seed, settings.num_rows, settings.bad_share)
    lines, behaviours = [], {}
    with written_whole(site) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for row in range(first, last):
            model_row = next(earlier for earlier in range(row, -1, -1) if names[earlier] is None)
            item = published_row(config, row, names[row], model_row)
            for path, body in item.files.items():
                write_entry(archive, path, body)
            behaviours.update(item.behaviours)
            lines.append([item.metadata, item.truth])
    with written_whole(rows) as temporary:
        temporary.write_text(json.dumps({"lines": lines, "behaviours": behaviours}))
    return site, rows


def write_entry(archive: zipfile.ZipFile, path: str, body: bytes) -> None:
    """An uncompressed entry without a date or an owner: equal content gives equal archives."""
    info = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    archive.writestr(info, body, zipfile.ZIP_STORED)


def chunks(num_rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, num_rows, CHUNK_ROWS):
        yield first, min(first + CHUNK_ROWS, num_rows)


def join(pieces: Path, out: Path, num_rows: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All pieces as one site archive `out`. Returns the rows of the list and of the truth table."""
    metadata, truths, behaviours = [], [], {}
    with zipfile.ZipFile(out, "w") as archive:
        for first, _ in chunks(num_rows):
            site, rows = piece_files(pieces, first)
            piece = json.loads(rows.read_text())
            metadata += [line[0] for line in piece["lines"]]
            truths += [line[1] for line in piece["lines"]]
            behaviours.update(piece["behaviours"])
            with zipfile.ZipFile(site) as part:
                for info in part.infolist():
                    write_entry(archive, info.filename, part.read(info))
        write_entry(archive, BEHAVIOURS, json.dumps(behaviours, indent=1, sort_keys=True).encode())
    return metadata, truths
