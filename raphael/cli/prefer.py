"""`raphael prefer`: which of two models' images people prefer."""

from __future__ import annotations

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("prefer", help="which of two models' images people prefer: a page, and its tally")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="two folders of images of the same prompts -> a blind page to give away")
    make.add_argument(
        "--a", type=Path, required=True, help="a folder with images.json, as `raphael generate` writes it"
    )
    make.add_argument("--b", type=Path, required=True, help="the other one, of the same prompts")
    make.add_argument("--names", nargs=2, metavar=("A", "B"), help="for the tally (default: the folders' names)")
    make.add_argument("--seed", type=int, default=0, help="of order and sides (default: %(default)s)")
    make.add_argument("--key", type=Path, help="where what tells them apart goes (default: OUT.key.json)")
    make.add_argument("--out", type=Path, required=True, help="the folder for index.html and its images")
    make.set_defaults(act=_prefer_make)
    tally = actions.add_parser("tally", help="results files of raters -> shares with 95 %% intervals")
    tally.add_argument("results", nargs="+", type=Path, metavar="RESULTS.csv")
    tally.add_argument(
        "--key", type=Path, action="append", required=True, help="repeatable: one chart of several studies"
    )
    tally.add_argument("--out", type=Path, help="a folder for preference.json, .csv and .png")
    tally.set_defaults(act=_prefer_tally)


def _prefer_make(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.studies.preference import make_study

    names = tuple(arguments.names or (arguments.a.resolve().name, arguments.b.resolve().name))
    key = make_study(arguments.a, arguments.b, arguments.out, names, arguments.seed, arguments.key)
    print(f"{arguments.out / 'index.html'}: for the raters, with its folder\n{key}: keep it, for the tally")


def _prefer_tally(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.studies.preference_tally import tally

    tally(arguments.results, arguments.key, arguments.out)
