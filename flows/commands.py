"""`raphael train`: fine-tuning, as a program of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys

from raphael.base.stage import StageError


def add_train(commands: argparse._SubParsersAction) -> None:
    # its own program reads its arguments: here "-" is no sign of an option
    text = "fine-tune a checkpoint on images with captions: raphael train --help"
    command = commands.add_parser("train", help=text, add_help=False, prefix_chars="\0")
    command.add_argument("rest", nargs="*")
    command.set_defaults(act=_train)


def _train(arguments: argparse.Namespace) -> None:
    status = subprocess.run([sys.executable, "-m", "flows.finetune", *arguments.rest]).returncode
    if status:
        raise StageError("its message is above")
