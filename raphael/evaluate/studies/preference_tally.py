"""`raphael prefer tally`: the answers of all raters become shares with 95 % intervals, a CSV, and a bar chart.

The chart has the form of RAPHAEL's study on ViLG-300 (arXiv 2305.18295, section 4.1; drawn on its project page):
for each opponent the share of answers for either model with 95 % caps; what is left to 100 % is "no difference".
Intervals are bootstrapped over prompts: the raters of one prompt look at the same images, so they count together.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from raphael.base.stage import StageError, read_json, write_json
from raphael.evaluate.metrics.intervals import bootstrap_mean
from raphael.evaluate.protocols.csv_tables import Table

CHOICES = ("left", "tie", "right")
Answer = tuple[str, str, str]  # item, rater, "a" | "tie" | "b"


def tally(results: Sequence[Path], keys: Sequence[Path], out: Path | None = None) -> list[dict[str, Any]]:
    """One summary per key, in their order; print them, and write preference.{json,csv,png} to the folder `out`.

    Raises StageError for results of no key's study, answers that are none, or a rater who answers one item twice.
    """
    opened = [_read_key(path) for path in keys]
    studies = {key["study"]: key for key in opened}
    if len(studies) < len(opened):
        raise StageError("prefer: got one study's key twice, expected different ones")
    answers = {study: {name: [] for name in key["questions"]} for study, key in studies.items()}
    seen: dict[tuple[str, str, str], tuple[dict[str, str], Path]] = {}
    for file in results:
        for row in read_results(file, studies):
            who = (row["study"], row["rater"], row["item"])
            if who in seen:
                raise StageError(
                    f"prefer: {file} and {seen[who][1]}: {row['rater']!r} answers {row['item']} in both; give only the "
                    "later file of a rater, and other names to other people"
                )
            seen[who] = (row, file)
            sides = studies[row["study"]]["items"][row["item"]]
            for question, given in answers[row["study"]].items():
                if row[question]:
                    given.append((row["item"], row["rater"], sides.get(row[question], "tie")))
    summaries = [summarise(key, answers[key["study"]]) for key in opened]
    print("\n\n".join(map(table, summaries)))
    if out:
        write_json(out / "preference.json", summaries)
        write_csv(out / "preference.csv", summaries)
        bar_chart(out / "preference.png", summaries)
        print(f"\n{out}/preference.json, .csv, .png")
    return summaries


def read_results(file: Path, studies: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of one results file of the page, checked. Raises StageError with file and line."""
    rows = list(Table(file, "the CSV that the page saves"))
    if not rows:
        raise StageError(f"prefer: {file}: holds no answers")
    for line, row in enumerate(rows, 2):
        where = f"prefer: {file}:{line}"
        key = studies.get(row.get("study") or "")
        if key is None:
            raise StageError(f"{where}: study {row.get('study')!r}, the keys given are of {', '.join(studies)}")
        if row.get("item") not in key["items"] or not row.get("rater"):
            raise StageError(f"{where}: got item {row.get('item')!r} by {row.get('rater')!r}, not of this study")
        for question in key["questions"]:
            if row.get(question) not in (*CHOICES, ""):
                raise StageError(
                    f"{where}: {question}: got {row.get(question)!r}, expected {', '.join(CHOICES)} or nothing"
                )
    return rows


def summarise(key: dict[str, Any], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """{study, names, items, raters, questions: {question: shares(...) and by_suite: {suite: shares(...)}}}."""
    questions = {}
    for question, given in answers.items():
        if len({item for item, _, _ in given}) < 2:
            raise StageError(
                f"prefer: study {key['study']}: {question} is answered for fewer than 2 prompts: no interval"
            )
        suites: dict[str, list[Answer]] = defaultdict(list)
        for answer in given:
            suites[key["items"][answer[0]]["suite"]].append(answer)
        parts = {suite: shares(part) for suite, part in sorted(suites.items()) if len({a[0] for a in part}) > 1}
        questions[question] = shares(given) | {"by_suite": parts if len(suites) > 1 else {}}
    everyone = [answer for given in answers.values() for answer in given]
    return {
        "study": key["study"],
        "names": key["names"],
        "items": len({item for item, _, _ in everyone}),
        "items_of_study": len(key["items"]),
        "raters": len({rater for _, rater, _ in everyone}),
        "questions": questions,
    }


def shares(given: Sequence[Answer]) -> dict[str, Any]:
    """{n, a, tie, b, lead: {share, low, high}, agreement}: shares of the answers, bootstrapped over items.

    lead: share of a minus share of b. agreement: of two raters of one item, how often they say the same; None where no
    item has two.
    """
    items = [item for item, _, _ in given]
    found: dict[str, Any] = {"n": len(given)}
    for choice in ("a", "tie", "b"):
        found[choice] = _mean([float(answer == choice) for _, _, answer in given], items)
    found["lead"] = _mean([{"a": 1.0, "tie": 0.0, "b": -1.0}[answer] for _, _, answer in given], items, signed=True)
    by_item: dict[str, list[str]] = defaultdict(list)
    for item, _, answer in given:
        by_item[item].append(answer)
    same = [x == y for choices in by_item.values() for x, y in combinations(choices, 2)]
    found["agreement"] = sum(same) / len(same) if same else None
    return found


def table(summary: dict[str, Any]) -> str:
    names = summary["names"]
    lines = [
        f"study {summary['study']}: {names['a']} against {names['b']}, {summary['items']} of "
        f"{summary['items_of_study']} prompts, {summary['raters']} raters; % of the answers [95 %]"
    ]
    width = max(len(name) for name in (*names.values(), "no difference"))
    for question, found in summary["questions"].items():
        agreed = "" if found["agreement"] is None else f", two raters agree on {found['agreement']:.0%}"
        lines.append(f"  {question} ({found['n']} answers{agreed})")
        for choice, label in (("a", names["a"]), ("tie", "no difference"), ("b", names["b"]), ("lead", "lead")):
            part = found[choice]
            lines.append(
                f"    {label:<{width}} {_percent(part['share'])}  [{_percent(part['low'])},{_percent(part['high'])}]"
            )
    return "\n".join(lines)


def write_csv(file: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """One row per study, question, suite ("": all) and choice; shares in [0, 1], the lead in [-1, 1]."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["study", "question", "suite", "choice", "model", "share", "low", "high", "answers"])
        for summary in summaries:
            names = {**summary["names"], "tie": "no difference", "lead": "lead"}
            for question, found in summary["questions"].items():
                for suite, part in {"": found, **found["by_suite"]}.items():
                    for choice, name in names.items():
                        values = [f"{part[choice][key]:.6f}" for key in ("share", "low", "high")]
                        writer.writerow([summary["study"], question, suite, choice, name, *values, part["n"]])


def bar_chart(file: Path, summaries: Sequence[dict[str, Any]]) -> None:
    """A panel a question, a group an opponent, either model's share with 95 % caps."""
    from matplotlib.figure import Figure

    questions = list(dict.fromkeys(name for summary in summaries for name in summary["questions"]))
    figure = Figure(figsize=(1.6 + len(questions) * (1.4 + 1.5 * len(summaries)), 4.2), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(questions), sharey=True, squeeze=False)[0]
    common = {summary["names"]["a"] for summary in summaries}
    ours = common.pop() if len(common) == 1 else "the first"
    theirs = summaries[0]["names"]["b"] if len(summaries) == 1 else "the other"
    for panel, question in zip(panels, questions, strict=True):
        for choice, offset, colour in (("a", -0.2, "#ad4a28"), ("b", 0.2, "#a8a49b")):
            parts = [summary["questions"][question][choice] for summary in summaries]
            heights = [100 * part["share"] for part in parts]
            caps = [[100 * (p["share"] - p["low"]) for p in parts], [100 * (p["high"] - p["share"]) for p in parts]]
            places = [index + offset for index in range(len(parts))]
            style = {"capsize": 4, "ecolor": "#211d18", "error_kw": {"elinewidth": 1.1}}
            label = ours if choice == "a" else theirs
            panel.bar(
                places,
                heights,
                0.36,
                yerr=caps,
                color=colour,
                label=label,
                **style,
            )
            for place, height, cap in zip(places, heights, caps[1], strict=True):
                panel.text(place, height + cap + 1.2, f"{height:.1f}", ha="center", va="bottom", fontsize=8.5)
        panel.set_xticks(range(len(summaries)), [summary["names"]["b"] for summary in summaries])
        panel.set_title(
            {"quality": "picture quality", "alignment": "image-text alignment"}.get(question, question), fontsize=11
        )
        panel.set_xlim(-0.75, len(summaries) - 0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(length=0)
    panels[0].set_ylabel("preferred by raters, %")
    panels[0].set_ylim(0, 110)  # room for the number above a cap at 100
    panels[0].set_yticks(range(0, 101, 20))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _read_key(path: Path) -> dict[str, Any]:
    key = read_json(path)
    if not isinstance(key, dict) or not {"study", "names", "questions", "items"} <= set(key):
        raise StageError(f"prefer: {path}: not a key of `raphael prefer make`, expected study, names, questions, items")
    return key


def _mean(values: list[float], items: list[str], signed: bool = False) -> dict[str, float]:
    """Cut to where it can lie: the widened percentiles of bootstrap_mean may pass 0 and 100 %."""
    low, high = bootstrap_mean(values, items)
    least = -1.0 if signed else 0.0
    return {"share": sum(values) / len(values), "low": max(least, low), "high": min(1.0, high)}


def _percent(share: float) -> str:
    return f"{100 * share:6.1f}"
