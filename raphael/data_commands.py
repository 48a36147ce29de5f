"""`raphael data ...`: arguments here, the work in modules of data_pipeline, which run as programs of their own."""

from __future__ import annotations

import argparse
import subprocess
import sys

from raphael.stage import StageError


def add_data(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("data", help="forget pictures on request; the data card")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "remove pictures and every trace of them from data/, for good, and prove it"
    forget = actions.add_parser("forget", help=text, description=text.capitalize() + ".")
    forget.add_argument("--url", action="append", default=[], help="an address; repeatable")
    forget.add_argument("--domain", action="append", default=[], help="every host of it; repeatable")
    forget.add_argument("--list", help="a file of urls, domains, md5: and sha256: entries")
    text = "data_card.json and reports/data_card.html: what the data are, what was dropped and why"
    card = actions.add_parser("card", help=text, description=text.capitalize() + ".")
    for each in (forget, card):
        each.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
        each.set_defaults(act=_run)


def _run(arguments: argparse.Namespace) -> None:
    module = {"forget": "data_pipeline.forget", "card": "data_pipeline.card"}[arguments.action]
    told = ["--params", arguments.params]
    for name in ("url", "domain"):
        for value in getattr(arguments, name, []):
            told += [f"--{name}", value]
    if getattr(arguments, "list", None):
        told += ["--list", arguments.list]
    status = subprocess.run([sys.executable, "-m", module, *told]).returncode
    if status:
        raise StageError(f"python -m {module} ended with status {status}; its message is above")
