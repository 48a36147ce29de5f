"""The sub-commands of the evaluation room that raphael/cli.py adds: arguments here, the work in the module of each."""

from __future__ import annotations

import argparse
from pathlib import Path

BENCHES = ("geneval", "dpg", "t2i-compbench", "partiprompts")


def add_export(evaluate: argparse.ArgumentParser) -> None:
    actions = evaluate.add_subparsers(dest="action", metavar="export")
    text = "write a folder of pictures in the layout of a public benchmark's own scorer"
    command = actions.add_parser("export", help=text, description=text.capitalize() + ".")
    command.add_argument("--bench", choices=BENCHES, required=True)
    command.add_argument("--images", type=Path, required=True, help="a folder with images.json, prompts in it")
    command.add_argument(
        "--prompts", type=Path, required=True, help="the benchmark's own prompt file (docs/evaluation.md)"
    )
    command.add_argument("--out", type=Path, required=True, help="a new or an empty folder")
    command.set_defaults(act=_export)


def _export(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.benches import export

    print(export(arguments.bench, arguments.images, arguments.prompts, arguments.out))


def add_prefer(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("prefer", help="which of two models' pictures people prefer: a page, and its tally")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="two folders of pictures of the same prompts -> a blind page to give away")
    make.add_argument(
        "--a", type=Path, required=True, help="a folder with images.json, as `raphael generate` writes it"
    )
    make.add_argument("--b", type=Path, required=True, help="the other one, of the same prompts")
    make.add_argument("--names", nargs=2, metavar=("A", "B"), help="for the tally (default: the folders' names)")
    make.add_argument("--seed", type=int, default=0, help="of order and sides (default: %(default)s)")
    make.add_argument("--key", type=Path, help="where what tells them apart goes (default: OUT.key.json)")
    make.add_argument("--out", type=Path, required=True, help="the folder for index.html and its pictures")
    make.set_defaults(act=_prefer_make)
    tally = actions.add_parser("tally", help="results files of raters -> shares with 95 %% intervals")
    tally.add_argument("results", nargs="+", type=Path, metavar="RESULTS.csv")
    tally.add_argument(
        "--key", type=Path, action="append", required=True, help="repeatable: one chart of several studies"
    )
    tally.add_argument("--out", type=Path, help="a folder for preference.json, .csv and .png")
    tally.set_defaults(act=_prefer_tally)


def add_paths(commands: argparse._SubParsersAction) -> None:
    text = "can words be told by their ways through the experts, and did training do that; where timesteps go"
    command = commands.add_parser("paths", help=text, description=text.capitalize() + ".")
    command.add_argument("checkpoint", type=Path, help="a pipeline folder, as models/raphael")
    command.add_argument(
        "--untrained", type=int, default=5, help="sets of random gates beside it (default: %(default)s)"
    )
    command.add_argument("--rounds", type=int, default=30, help="of boosting (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="of folds and random gates (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="a folder for paths.json, pictures and section.html")
    command.set_defaults(act=_paths)


def _paths(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.path_report import analyse

    analyse(arguments.checkpoint, arguments.out, arguments.untrained, arguments.rounds, arguments.seed)


def _prefer_make(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.preference import make_study

    names = tuple(arguments.names or (arguments.a.resolve().name, arguments.b.resolve().name))
    key = make_study(arguments.a, arguments.b, arguments.out, names, arguments.seed, arguments.key)
    print(f"{arguments.out / 'index.html'}: for the raters, with its folder\n{key}: keep it, for the tally")


def _prefer_tally(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.preference_tally import tally

    tally(arguments.results, arguments.key, arguments.out)
