"""`raphael paths`: can words be told by their ways through the experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from raphael.base import devices
from raphael.base.config import consent
from raphael.cli.options import chosen_device


def add(commands: argparse._SubParsersAction) -> None:
    text = "can words be told by their ways through the experts, and did training do that; where timesteps go"
    command = commands.add_parser("paths", help=text, description=text.capitalize() + ".")
    command.add_argument("checkpoint", help="a pipeline folder, as models/raphael, or a name: scenes")
    command.add_argument(
        "--untrained", type=int, default=5, help="sets of random gates beside it (default: %(default)s)"
    )
    command.add_argument("--rounds", type=int, default=30, help="of boosting (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of folds and random gates (default: %(default)s)")
    devices.add_option(command)
    command.add_argument("--out", type=Path, required=True, help="a folder for paths.json, images and section.html")
    consent.add_option(command)
    command.set_defaults(act=_paths)


def _paths(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.studies.path_report import analyse

    device = str(chosen_device(arguments))
    analyse(arguments.checkpoint, arguments.out, arguments.untrained, arguments.rounds, arguments.seed, device)
