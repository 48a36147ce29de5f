"""`raphael model show`, `raphael info`: what a preset or a checkpoint is made of."""

from __future__ import annotations

import argparse

from raphael.cli.options import add_command, chosen


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("model", help="what a preset is made of, without its weights")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="tree, parameters, FLOPs for each image size, memory for training")
    show.add_argument("preset", help="a preset's name or file; a folder's (imagen): each network in it")
    show.set_defaults(act=_model_show)

    command = add_command(commands, "info", "what a checkpoint or a preset is made of", _info)
    command.add_argument("--preset", default="", help="a preset's name or file, instead of a checkpoint")


def _info(arguments: argparse.Namespace) -> None:
    from raphael.summary.checkpoint import describe_checkpoint, describe_preset

    print(describe_preset(arguments.preset) if arguments.preset else describe_checkpoint(chosen(arguments)))


def _model_show(arguments: argparse.Namespace) -> None:
    from raphael.summary.model import model_text
    from raphael.summary.network import network_text, networks_in

    if found := networks_in(arguments.preset):
        print("\n\n".join(network_text(name) for name in found))
    else:
        print(model_text(arguments.preset))
