"""reports/sweep.html and reports/sweep.json: the paper's figures for one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raphael.base.stage import write_json
from raphael.evaluate.report.page import TEMPLATES
from raphael.evaluate.report.pages import number, page_environment
from raphael.evaluate.report.sweep_figures import charts


def write_page(root: Path, results: dict[str, Any]) -> Path:
    """Both files."""
    write_json(root / "reports" / "sweep.json", results)
    page = root / "reports" / "sweep.html"
    page.write_text(render(results), encoding="utf-8")
    return page


def render(results: dict[str, Any]) -> str:
    """The page: complete in itself, texts escaped."""
    environment = page_environment()
    environment.filters["number"] = number
    return environment.get_template("sweep.html").render(
        css=(TEMPLATES / "report.css").read_text(encoding="utf-8"), results=results, figures=charts(results)
    )
