"""How many captions a core cleans: ours against a straightforward cleaner that asks some thirty expressions every time.

The peer is written in the manner of diffusers' DeepFloyd `_clean_caption` (url, tag, handle, id, file name, dash, quote
and product-code expressions, then ftfy and entities), without BeautifulSoup, which diffusers needs for it and the lock
does not hold: diffusers' own is not what is measured here. Both run over the same captions, by turns.
Writes results/captions-<device>-<yyyymm>.json, unless --quick.

    python benchmarks/captions.py [--captions FILE.parquet --column TEXT] [--quick]
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

from _machine import judged, keep

from data_pipeline.common.caption_rules import clean

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
TARGET_PER_S = 50_000  # of one core
_ENDINGS = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
STEPS: tuple[tuple[str, str], ...] = (
    (r"<person>", "person"),
    (r"\b((?:https?:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))", ""),
    (r"\b((?:www:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))", ""),
    (r"<[^<>]+>", " "),
    (r"@[\w\d]+\b", ""),
    (r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u301C\u3030\uFE31\uFE32\uFE58\uFE63\uFF0D]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_ENDINGS})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\/*]{1,}", " "),
    (r"\s+\.\s+", " "),
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_ENDINGS})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
)
COMPILED = tuple((re.compile(pattern), put) for pattern, put in STEPS)


def straightforward(text: str) -> str:
    import ftfy

    text = text.strip().lower()
    for pattern, put in COMPILED:
        text = pattern.sub(put, text)
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def per_second(function: Callable[[str], object], captions: list[str]) -> float:
    started_s = time.process_time()
    for caption in captions:
        function(caption)
    return len(captions) / (time.process_time() - started_s)


def corpora(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> captions."""
    import pyarrow.parquet as pq

    found: dict[str, list[str]] = {}
    laion, coco = SHARED / "laion" / "laion_url_text_5000.parquet", SHARED / "coco" / "captions_val2017.json"
    if arguments.captions:
        column = pq.read_table(arguments.captions, columns=[arguments.column])[arguments.column]
        found[Path(arguments.captions).name] = [text for text in column.to_pylist() if text]
    elif laion.is_file():
        found["LAION, as it came"] = [
            text for text in pq.read_table(laion, columns=["TEXT"])["TEXT"].to_pylist() if text
        ]
    if coco.is_file():
        found["COCO, clean"] = [item["caption"] for item in json.loads(coco.read_text())["annotations"]]
    rng = random.Random(0)
    colours, shapes = ("red", "blue", "green"), ("circle", "square", "star")
    made = [f"A {rng.choice(colours)} {rng.choice(shapes)} left of a {rng.choice(shapes)}" for _ in range(20_000)]
    return found or {"made up, clean": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", help="a parquet file of captions, instead of those beside the project")
    parser.add_argument("--column", default="TEXT")
    parser.add_argument("--quick", action="store_true", help="1,000 captions of each kind, once")
    arguments = parser.parse_args()
    clean("schÃ¶n"), straightforward("schÃ¶n")  # ftfy's import is not what is measured
    print("| captions | number | straightforward /s | ours /s | ratio | changed by ours |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows, summary = [], []
    for name, captions in corpora(arguments).items():
        captions = captions[:1000] if arguments.quick else captions
        peer = ours = 0.0
        for _ in range(1 if arguments.quick else 5):
            peer, ours = max(peer, per_second(straightforward, captions)), max(ours, per_second(clean, captions))
        changed = sum(clean(caption).text != caption for caption in captions) / len(captions)
        print(f"| {name} | {len(captions):,} | {peer:,.0f} | {ours:,.0f} | {ours / peer:.1f}x | {changed:.0%} |")
        rows.append({"captions": name, "number": len(captions), "ours_per_s": ours, "peer_per_s": peer})
        rows[-1]["changed_share"] = round(changed, 4)
        case = f"{name}; peer: straightforward cleaner"
        summary.append(judged(case, round(ours), round(peer), "captions/s, one core"))
        summary.append(judged(f"{name}; beside the target", round(ours), TARGET_PER_S, "captions/s", ">= 1.0"))
    if not arguments.quick:
        keep("captions", rows, summary)


if __name__ == "__main__":
    main()
