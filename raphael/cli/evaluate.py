"""`raphael evaluate`, `raphael prompts`: measure images by a protocol, or a workspace."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from raphael.base import devices
from raphael.base.stage import StageError

BENCHES = ("geneval", "dpg", "t2i-compbench", "partiprompts")


def add(commands: argparse._SubParsersAction) -> None:
    text = "run the evaluation and the report of a workspace; with --images, measure a folder by a protocol"
    command = commands.add_parser("evaluate", help=text, description=text.capitalize() + ".")
    command.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
    command.add_argument("--images", type=Path, help="a folder of images; images.json in it names prompts and settings")
    command.add_argument("--reference", type=Path, help="a folder of real images")
    command.add_argument("--protocol", default="pair-debug/v1", help="docs/evaluation.md (default: %(default)s)")
    command.add_argument(
        "--features",
        action="append",
        help="inception:FILE, open_clip:ARCH:FILE, a CLIP folder, taesd:FOLDER; repeatable",
    )
    command.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="one beside the protocol's own; repeatable",
    )
    command.add_argument("--aesthetic-head", type=Path, metavar="FILE", help="LAION's weights, for --metric aesthetic")
    command.add_argument("--prompts", type=Path, help="one prompt a line, in the order of the images")
    command.add_argument("--workers", type=int, default=1, help="that share the images (default: %(default)s)")
    command.add_argument("--ray", action="store_true", help="workers are Ray's: of RAY_ADDRESS, or of a private Ray")
    more = "the default, auto, is the GPU where there is one; of a workspace, what its params.yaml says"
    devices.add_option(command, None, more)
    command.add_argument("--cache", type=Path, default=Path("work/features"), help="default: %(default)s")
    command.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    command.add_argument("--guidance-scale", type=float, help="of the images, where images.json does not say")
    command.add_argument("--sampler", help="the same")
    command.add_argument("--steps", type=int, help="the same")
    command.add_argument("--weights", help="the same: a hash of the model's weights")
    command.set_defaults(act=_evaluate)
    _add_export(command)
    _add_prompts(commands)


def _add_export(evaluate: argparse.ArgumentParser) -> None:
    actions = evaluate.add_subparsers(dest="action", metavar="export")
    text = "write a folder of images in the layout of a public benchmark's own scorer"
    command = actions.add_parser("export", help=text, description=text.capitalize() + ".")
    command.add_argument("--bench", choices=BENCHES, required=True)
    command.add_argument("--images", type=Path, required=True, help="a folder with images.json, prompts in it")
    command.add_argument(
        "--prompts", type=Path, required=True, help="the benchmark's own prompt file (docs/evaluation.md)"
    )
    command.add_argument("--out", type=Path, required=True, help="a new or an empty folder")
    command.set_defaults(act=_export)


def _add_prompts(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("prompts", help="write the prompts of an evaluation protocol or a public benchmark")
    chosen = command.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--protocol", help="e.g. drawbench/v1")
    chosen.add_argument("--bench", choices=BENCHES, help="those of `raphael evaluate export`")
    command.add_argument("--source", type=Path, help="the file that the protocol or benchmark has its prompts in")
    command.add_argument("--out", type=Path, required=True, help="in the form of data/source/prompts.json")
    command.set_defaults(act=_prompts)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.images:
        from raphael.evaluate.protocols.folders import evaluate_folders

        evaluate_folders(arguments)
        return
    if arguments.metric or arguments.aesthetic_head:
        raise StageError(
            "got --metric or --aesthetic-head without --images; of a workspace set evaluate.metrics and "
            "evaluate.aesthetic_head in its params.yaml"
        )
    if arguments.reference or arguments.features or arguments.workers != 1 or arguments.ray:
        raise StageError(
            "got --reference, --features, --workers or --ray without --images, expected a folder of images with them"
        )

    for module in ("raphael.evaluate", "raphael.evaluate.report"):
        device = ["--device", arguments.device] if arguments.device else []
        status = subprocess.run([sys.executable, "-m", module, "--params", arguments.params, *device]).returncode
        if status:
            raise StageError(f"python -m {module} ended with status {status}; its message is above")


def _export(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.protocols.benches import export

    print(export(arguments.bench, arguments.images, arguments.prompts, arguments.out))


def _prompts(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.protocols.folders import write_prompts

    write_prompts(arguments)
