"""`raphael probe`, `raphael knockouts`, `raphael swap`: what a model knows of its captions, and by what way."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base import devices
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.stage import StageError, write_json
from raphael.base.strict import ConfigError
from raphael.cli.options import add_command, open_pipeline

if TYPE_CHECKING:
    from raphael.base.probe_set import ProbeSet


def add(commands: argparse._SubParsersAction) -> None:
    text = "which facts of a caption the network knows: its loss with each of them exchanged"
    command = add_command(commands, "probe", text, _probe)
    _scenes(command, 200, "scenes for each fact")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    _common(command, "probe.json")

    text = "which parts of the network do the work: its loss with each of them taken away"
    command = add_command(commands, "knockouts", text, _knockouts)
    _scenes(command, 128, "images")
    command.add_argument(
        "--records", type=Path, help="instead: encoded records, those that train.num_heldout keeps out"
    )
    command.add_argument("--seed", type=int, default=0, help="of noise and random routes (default: %(default)s)")
    _common(command, "knockouts.json")

    text = "whose colour, shape and background an image shows when the pooled text is another's than the attention"
    command = add_command(commands, "swap", text, _swap)
    _scenes(command, 48, "pairs of prompts")
    command.add_argument("--seed", type=int, default=0, help="of the images (default: %(default)s)")
    devices.add_option(command)
    command.add_argument("--out", type=Path, default=Path("swap.json"), help="default: %(default)s")


def _scenes(command: argparse.ArgumentParser, n: int, what: str) -> None:
    default = Path("data/source/probe.npz")
    about = "held-out scenes, written by the stage source (default: %(default)s)"
    command.add_argument("--scenes", type=Path, default=default, help=about)
    command.add_argument("--n", type=int, default=n, help=f"{what} (default: %(default)s)")


def _common(command: argparse.ArgumentParser, out: str) -> None:
    devices.add_option(command)
    about = "of the network's products; auto: bf16 where the processor has it (default: %(default)s)"
    command.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="auto", help=about)
    command.add_argument("--out", type=Path, default=Path(out), help="default: %(default)s")


def _bar(total: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit=f" {unit}", mininterval=0.2 if sys.stderr.isatty() else 10.0, dynamic_ncols=True)


def _read_scenes(arguments: argparse.Namespace) -> ProbeSet:
    from raphael.base.probe_set import read_probe_set

    if arguments.n < 1:
        raise StageError(f"--n: got {arguments.n}, expected at least 1")
    return read_probe_set(arguments.scenes)


def _probe(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.instruments.probe import probe_pipeline, probe_table
    from raphael.objectives.probe import captions_of

    asked, pipeline = _read_scenes(arguments).take(arguments.n), open_pipeline(arguments)
    expect_captions(pipeline.system, arguments.command)
    with _bar(captions_of(asked), "captions") as bar:
        measured = probe_pipeline(pipeline, asked, arguments.seed, arguments.precision, bar.update)
    write_json(arguments.out, {"model": pipeline.identity, **measured})
    print(probe_table(measured))
    print(f"saved to {arguments.out}")


def expect_captions(system: str, command: str) -> None:
    """Raises ConfigError for a system whose prompts are no captions: there is no fact in them to exchange."""
    if (told := find_system(system).told) != "captions":
        raise ConfigError(
            f"{command}: got a checkpoint of the system {system}, which is told {told}, expected one that is told "
            "captions"
        )


def _knockouts(arguments: argparse.Namespace) -> None:
    from raphael.base.records import Records
    from raphael.evaluate.instruments import knockouts as ko

    scenes = None if arguments.records else _read_scenes(arguments)
    pipeline = open_pipeline(arguments, DEFAULT)
    if scenes is not None:
        images = ko.images_of_scenes(pipeline, scenes, arguments.n)
    else:
        images = ko.images_of_records(pipeline, Records(arguments.records), arguments.n)
    asked = ko.Knockouts(pipeline, images, seed=arguments.seed, precision=arguments.precision)
    with _bar(len(asked), "knock-outs") as bar:
        measured = ko.knockouts(asked, bar.update)
    write_json(arguments.out, {"model": pipeline.identity, **measured})
    print(ko.knockout_table(measured))
    print(f"saved to {arguments.out}")


def _swap(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.instruments.swap import pairs_of, swap, swap_text

    scenes, pipeline = _read_scenes(arguments), open_pipeline(arguments, DEFAULT)
    measured = swap(pipeline, pairs_of(scenes.entries(), arguments.n), arguments.seed)
    write_json(arguments.out, {"model": pipeline.identity, **measured})
    print(swap_text(measured))
    print(f"saved to {arguments.out}")
