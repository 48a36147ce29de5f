"""The `raphael` command. A sub-command imports its room when it is called: `raphael --help` answers at once.

Sub-commands of rooms above this one (`raphael train`, `raphael data`) are entry points of the group raphael.commands: a
module's function that adds its parser, named in pyproject.toml.
"""

from __future__ import annotations

import argparse
from importlib.metadata import entry_points

from raphael.base.stage import StageError, one_clear_line
from raphael.base.strict import ConfigError
from raphael.cli import compare, edit, evaluate, generate, inside, instruments, model, paths, prefer, weights
from raphael.serve import command as serve

GROUP = "raphael.commands"


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    with one_clear_line(f"raphael {arguments.command}") as outcome:
        try:
            arguments.act(arguments)
        except (StageError, ConfigError):
            raise
        except (
            ValueError
        ) as error:  # what a user can get wrong: a checkpoint of another shape, a size, a sampler's name
            raise StageError(str(error)) from error
    return outcome.status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raphael", description="An open RAPHAEL: generate from a checkpoint, look into it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for sub_command in (generate, edit, serve, inside, instruments, weights, model, evaluate, compare, paths, prefer):
        sub_command.add(commands)
    for point in sorted(entry_points(group=GROUP)):
        point.load()(commands)
    return parser
