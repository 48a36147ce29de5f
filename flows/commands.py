"""`raphael train`: fine-tuning, and guides beside a model, as programs of their own."""

from __future__ import annotations

import argparse
import subprocess
import sys

from raphael.base.stage import StageError


def add_train(commands: argparse._SubParsersAction) -> None:
    # its own program reads its arguments: here "-" is no sign of an option
    text = "fine-tune a checkpoint on images with captions: raphael train --help; --guide KIND: a guide of its sampling"
    command = commands.add_parser("train", help=text, add_help=False, prefix_chars="\0")
    command.add_argument("rest", nargs="*")
    command.set_defaults(act=_train)


def _train(arguments: argparse.Namespace) -> None:
    guide = any(word.split("=")[0] == "--guide" for word in arguments.rest)
    program = "raphael.systems.guides" if guide else "flows.finetune"
    status = subprocess.run([sys.executable, "-m", program, *arguments.rest]).returncode
    if status:
        raise StageError("its message is above")
