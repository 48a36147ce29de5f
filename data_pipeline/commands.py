"""`raphael data ...` and `raphael plan`: arguments here, the work in data_pipeline/tools, whose modules run as programs
of their own."""

from __future__ import annotations

import argparse
import subprocess
import sys

from raphael.base.stage import StageError

MODULES = {
    "forget": "data_pipeline.tools.forget",
    "card": "data_pipeline.tools.card",
    "check": "data_pipeline.tools.checking.check",
    "caption": "data_pipeline.tools.captioning",
    "verify": "data_pipeline.tools.verify",
    "status": "data_pipeline.tools.scale.status",
}
PLAN = "data_pipeline.tools.scale.plan"
OWN = {  # their programs read their arguments
    "check": "which images of a folder, parquet files, tars or COCO would be used, which not and why",
    "caption": "a caption beside every image that has none, by any captioner of transformers",
}


def add_data(commands: argparse._SubParsersAction) -> None:
    text = "hours, terabytes and dollars of the data stages for so many rows and machines: raphael plan --help"
    plan = commands.add_parser("plan", help=text, add_help=False, prefix_chars="\0")
    plan.add_argument("rest", nargs="*")
    plan.set_defaults(act=lambda arguments: _run(PLAN, arguments.rest))
    text = (
        "check images, caption them, forget them on request; the data card; how far the stages are; verify every file"
    )
    command = commands.add_parser("data", help=text)
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in OWN.items():
        # here "-" is no sign of an option
        own = actions.add_parser(name, help=f"{text}: raphael data {name} --help", add_help=False, prefix_chars="\0")
        own.add_argument("rest", nargs="*")
        own.set_defaults(act=lambda arguments: _run(MODULES[arguments.action], arguments.rest))
    text = "remove images and every trace of them from data/, for good, and prove it"
    forget = actions.add_parser("forget", help=text, description=text.capitalize() + ".")
    forget.add_argument("--url", action="append", default=[], help="an address; repeatable")
    forget.add_argument("--domain", action="append", default=[], help="every host of it; repeatable")
    forget.add_argument("--list", help="a file of urls, domains, md5: and sha256: entries")
    text = "data_card.json and reports/data_card.html: what the data are, what was dropped and why"
    card = actions.add_parser("card", help=text, description=text.capitalize() + ".")
    text = "read everything below data/ and models/ and name each file that is not what was written"
    check = actions.add_parser("verify", help=text, description=text.capitalize() + ".")
    check.add_argument("--cache", action="store_true", help="read DVC's cache, too")
    text = (
        "how far each data stage is: partitions, rows a second, failures by reason; from files, while they run or after"
    )
    status = actions.add_parser("status", help=text, description=text.capitalize() + ".")
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    for each in (forget, card, check, status):
        each.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
        each.set_defaults(act=_act)


def _act(arguments: argparse.Namespace) -> None:
    told = ["--params", arguments.params]
    for name in ("url", "domain"):
        for value in getattr(arguments, name, []):
            told += [f"--{name}", value]
    for name in ("cache", "json"):
        if getattr(arguments, name, False):
            told.append(f"--{name}")
    if getattr(arguments, "list", None):
        told += ["--list", arguments.list]
    _run(MODULES[arguments.action], told)


def _run(module: str, told: list[str]) -> None:
    status = subprocess.run([sys.executable, "-m", module, *told]).returncode
    if status:
        raise StageError(f"python -m {module} ended with status {status}; its message is above")
