"""`raphael compare RUN RUN ...`: what differs between tracked runs, as a table, and one page with curves and grids."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raphael.base.config.params import load_config
from raphael.base.stage import StageError
from raphael.base.tracking.tracker import connect, public, resolve_uri
from raphael.evaluate.report.pages import page_environment

TEMPLATES = Path(__file__).resolve().parents[1] / "report" / "templates"
MAX_RUNS = 8  # as many as report.css has colours for
MAX_GRIDS, GRID_SIDE_PX = 6, 640
MIN_POINTS = 2  # of a curve


@dataclass
class Run:
    """curves: metric -> [(step, value)] by step; grids: series -> [(step, data URI)] by step."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    grids: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def compare_runs(names: Sequence[str], params: str | Path, out: Path) -> str:
    """Read the runs, print the table, write the page. Raises StageError for a run that is not there or ambiguous."""
    if not 2 <= len(names) <= MAX_RUNS:
        raise StageError(f"got {len(names)} runs, expected 2 to {MAX_RUNS}")
    config = load_config(params)
    uri = resolve_uri(config, Path(params).resolve().parent)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise StageError(f"{uri}: no tracking store there; train first, or set tracking.uri in {params}")
    runs = read_runs(uri, config.tracking.experiment, names)
    text = difference_table(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(runs), encoding="utf-8")
    print(f"{text}\n\n{out}")
    return text


def read_runs(uri: str, experiment: str, names: Sequence[str]) -> list[Run]:
    """The runs with these ids, starts of ids, or names, with their curves and grids. Raises StageError."""
    client = connect(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        known = _all_runs(client, found.experiment_id) if found else []
    except Exception as error:  # of SQLAlchemy, requests, MLflow
        reason = " ".join(str(error).split())[:160]
        raise StageError(f"{public(uri)} cannot be read ({type(error).__name__}: {reason})") from None
    runs = []
    for name in names:
        matches = [run for run in known if name in (run.info.run_id, run.info.run_name)]
        matches = matches or [run for run in known if run.info.run_id.startswith(name)]
        if len(matches) != 1:
            recent = ", ".join(f"{run.info.run_id[:8]} ({run.info.run_name})" for run in (matches or known)[:6])
            found_text = "no run" if not matches else f"{len(matches)} runs"
            raise StageError(f"{name!r}: {found_text} in {experiment} of that id or name; there are {recent or 'none'}")
        runs.append(_read(client, matches[0]))
    if len({run.run_id for run in runs}) < len(runs):
        raise StageError(f"got one run twice ({', '.join(names)}), expected different ones")
    return runs


def _all_runs(client: Any, experiment_id: str) -> list[Any]:
    runs, token = [], None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _read(client: Any, run: Any) -> Run:
    info, data = run.info, run.data
    result = Run(info.run_id, info.run_name or info.run_id[:8], info.status, dict(data.params), dict(data.metrics))
    for name in sorted(data.metrics):
        points = sorted(
            (point.step, point.timestamp, point.value) for point in client.get_metric_history(info.run_id, name)
        )
        # of a step that was measured again the last value: two of one step are no curve
        result.curves[name] = sorted({float(step): value for step, _, value in points}.items())
    result.grids = _grids(client, info.run_id)
    return result


def _grids(client: Any, run_id: str) -> dict[str, list[tuple[int, str]]]:
    """Images that were logged with a step. MLflow names the file KEY%step%STEP%timestamp%... (+ on some systems)."""
    import re

    from raphael.base.images.fit import read_image
    from raphael.evaluate.report.figures import data_uri

    series: dict[str, dict[int, str]] = {}
    for item in client.list_artifacts(run_id, "images"):
        match = re.match(r"(.+?)[%+]step[%+](\d+)[%+].*\.png$", Path(item.path).name)
        if match:
            series.setdefault(match[1].replace("~", "/"), {})[int(match[2])] = item.path
    grids: dict[str, list[tuple[int, str]]] = {}
    with tempfile.TemporaryDirectory() as home:
        for key, steps in series.items():
            for step in _spread(sorted(steps), MAX_GRIDS):
                image = read_image(client.download_artifacts(run_id, steps[step], home), again="leave that run out")
                grids.setdefault(key, []).append((step, data_uri(image, GRID_SIDE_PX)))
    return grids


def differences(runs: Sequence[Run], kind: str) -> dict[str, list[Any]]:
    """name -> one value per run, None where a run has none; only what differs. kind: "metrics" or "params"."""
    names = sorted({name for run in runs for name in getattr(run, kind)})
    rows = {name: [getattr(run, kind).get(name) for run in runs] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def metric_cells(runs: Sequence[Run]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Metrics that differ, as texts: those of two runs at least, then those that one run alone has.

    NAME_low and NAME_high are no rows of their own: they stand behind NAME as its interval.
    """
    shared: dict[str, list[str]] = {}
    alone: dict[str, list[str]] = {}
    known = {name for run in runs for name in run.metrics}
    for name, values in differences(runs, "metrics").items():
        if any(name.endswith(end) and name.removesuffix(end) in known for end in ("_low", "_high")):
            continue
        cells = []
        for run, value in zip(runs, values, strict=True):
            low, high = (run.metrics.get(f"{name}_{end}") for end in ("low", "high"))
            inside = value is not None and low is not None and high is not None
            cells.append(f"{value:.4g} [{low:.3g}, {high:.3g}]" if inside else _text(value))
        (alone if sum(value is not None for value in values) == 1 else shared)[name] = cells
    return shared, alone


def difference_table(runs: Sequence[Run]) -> str:
    """Parameters that differ, then metrics, last values; one column a run. Of one run's own metrics the number."""
    rows = [["run", *(f"{run.name} ({run.run_id[:8]})" for run in runs)], ["status", *(run.status for run in runs)]]
    shared, alone = metric_cells(runs)
    params = {name: list(map(_text, values)) for name, values in differences(runs, "params").items()}
    heads = {}
    for title, cells in (("parameters", params), ("metrics", shared)):
        heads[len(rows)] = f"{title} that differ" if cells else f"no {title} differ"
        rows += [[name, *values] for name, values in cells.items()]
    widths = [min(48, max(len(row[column]) for row in rows)) for column in range(len(runs) + 1)]
    lines = []
    for place, row in enumerate([*rows, []]):
        lines += [f"-- {heads[place]}"] if place in heads else []
        lines.append("  ".join(_cut(cell, width).ljust(width) for cell, width in zip(row, widths)).rstrip())
    if alone:
        lines[-1] = f"-- and {len(alone)} metrics that one run alone has: they are on the page"
    return "\n".join(lines).rstrip()


def render(runs: Sequence[Run]) -> str:
    """The page: complete in itself, texts escaped."""
    from raphael.evaluate.report.figures import line_chart

    charts = []
    for name in sorted({name for run in runs for name in run.curves}):
        # an empty curve keeps its place, so that a run has one colour on the whole page
        series = {run.name if _unique(runs) else run.run_id[:8]: run.curves.get(name, []) for run in runs}
        if max(map(len, series.values())) >= MIN_POINTS:
            of_several = sum(len(curve) >= MIN_POINTS for curve in series.values()) > 1
            charts.append({"name": name, "svg": line_chart(series), "of_several": of_several})
    keys = sorted({key for run in runs for key in run.grids})
    shared, alone = metric_cells(runs)
    environment = page_environment()
    return environment.get_template("compare.html").render(
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        runs=runs,
        metrics=shared,
        alone=alone,
        params={name: list(map(_text, values)) for name, values in differences(runs, "params").items()},
        charts=sorted(charts, key=lambda chart: not chart["of_several"]),  # sorted is stable: names stay in order
        grids=[{"key": key, "columns": [run.grids.get(key, []) for run in runs]} for key in keys],
    )


def _unique(runs: Sequence[Run]) -> bool:
    return len({run.name for run in runs}) == len(runs)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _spread(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]
