"""`raphael compare`: what differs between runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("compare", help="what differs between runs: a table, and one page with curves")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run ids of MLflow, or the start of one; names too")
    command.add_argument("--params", default="params.yaml", help="where its tracking store is (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("reports/compare.html"), help="default: %(default)s")
    command.set_defaults(act=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.studies.compare import compare_runs

    compare_runs(arguments.runs, arguments.params, arguments.out)
