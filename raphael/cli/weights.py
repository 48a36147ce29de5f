"""`raphael export`, `raphael import`: checkpoints in other programs' forms; `raphael lora`: adapters of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from raphael.base.config import consent
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.stage import StageError
from raphael.cli.options import add_lora


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("export", help="write a checkpoint in a form that other programs read")
    command.add_argument("checkpoint", help="a pipeline folder, such as models/raphael, or a name: scenes")
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command.add_argument(
        "--format", choices=("diffusers", "safetensors"), default="diffusers", help="default: %(default)s"
    )
    command.add_argument("--weights", choices=("ema", "raw"), default="ema", help="EMA or last (default: ema)")
    consent.add_option(command)
    command.set_defaults(act=_export)
    command = commands.add_parser(
        "import", help="a Stable Diffusion, of diffusers or in one file, or an export, as a pipeline folder"
    )
    command.add_argument("source", type=Path, help="a folder of diffusers, a single file, or a file of raphael export")
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command.add_argument("--preset", default="sd", help="whose experts a Stable Diffusion gets (default: %(default)s)")
    for field, kinds in find_system(DEFAULT).imported.items():
        command.add_argument(f"--{field.replace('_', '-')}", choices=kinds, help="instead of the preset's")
    command.add_argument("--prediction", choices=("eps", "v"), help="of a single file of Stable Diffusion 2")
    consent.add_option(command)
    command.set_defaults(act=_import)
    _add_lora(commands)


def _add_lora(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("lora", help="low-rank adapters: into a model, out of one, what a file holds")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = actions.add_parser("merge", help="write a model with adapters in its weights")
    merge.add_argument("--from", dest="checkpoint", required=True, help="a pipeline folder, or a name: scenes")
    add_lora(merge)
    merge.add_argument("--out", type=Path, required=True, help="a new folder")
    merge.set_defaults(act=_merge)
    extract = actions.add_parser("extract", help="write the adapter that comes nearest to a fine-tuned model")
    extract.add_argument("checkpoint", help="the fine-tuned model: a pipeline folder")
    extract.add_argument("--base", required=True, help="the model that it was trained from")
    extract.add_argument("--rank", type=int, default=8, help="default: %(default)s")
    extract.add_argument("--targets", nargs="+", default=["attention"], help="default: attention")
    extract.add_argument("--format", choices=("kohya", "peft"), default="kohya", help="default: %(default)s")
    extract.add_argument("--out", type=Path, required=True, help="a new .safetensors")
    extract.set_defaults(act=_extract)
    info = actions.add_parser("info", help="rank, parts and names of an adapter's file")
    info.add_argument("file", type=Path)
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(act=_info)
    for action in (merge, extract):
        consent.add_option(action)


def _merge(arguments: argparse.Namespace) -> None:
    from raphael.cli.options import load_adapters
    from raphael.generate.pipeline import RaphaelPipeline
    from raphael.systems.lora.work import merge

    if not arguments.lora:
        raise StageError("--lora: got none, expected at least one FILE[:WEIGHT]")
    pipeline = RaphaelPipeline.from_pretrained(arguments.checkpoint)
    load_adapters(pipeline, arguments.lora)
    merge(pipeline, arguments.out)
    print(arguments.out)


def _extract(arguments: argparse.Namespace) -> None:
    from raphael.systems.lora.file import Header
    from raphael.systems.lora.work import extract

    if arguments.rank < 1:
        raise StageError(f"--rank: got {arguments.rank}, expected at least 1")
    header = Header(rank=arguments.rank, alpha=float(arguments.rank))
    print(extract(arguments.checkpoint, arguments.base, arguments.out, header, arguments.targets, arguments.format))


def _info(arguments: argparse.Namespace) -> None:
    import json

    from raphael.systems.lora.work import info_text, read_info

    told = read_info(arguments.file)
    print(json.dumps(told) if arguments.json else info_text(told))


def _export(arguments: argparse.Namespace) -> None:
    from raphael.systems.exchange.export import export

    print(export(arguments.checkpoint, arguments.out, arguments.format, arguments.weights))


def _import(arguments: argparse.Namespace) -> None:
    from raphael.systems.exchange.import_model import import_model

    layers = {field: kind for field in find_system(DEFAULT).imported if (kind := getattr(arguments, field))}
    print(import_model(arguments.source, arguments.out, arguments.preset, layers, arguments.prediction))
    print(arguments.out)
