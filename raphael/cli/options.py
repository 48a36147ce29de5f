"""What several sub-commands share."""

from __future__ import annotations

import argparse
import math
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raphael.base import devices
from raphael.base.config import consent
from raphael.base.config.sampling import Sampling
from raphael.base.config.systems import expect_system
from raphael.base.strict import load, to_dict

if TYPE_CHECKING:
    import numpy as np
    import torch

    from raphael.generate.pipeline import RaphaelPipeline

UNASKED = {"precision": "fp32"}  # what a command says itself where nothing is asked for, whatever the model wants


def add_command(
    commands: argparse._SubParsersAction, name: str, text: str, act: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """A sub-command that works on a checkpoint: `chosen` says which."""
    command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
    default = "models/raphael where it is, else scenes, which comes with this package"
    command.add_argument("--checkpoint", help=f"a pipeline folder, or a name (default: {default})")
    consent.add_option(command)
    command.set_defaults(act=act)
    return command


def say_device(command: str, device: torch.device) -> None:
    """On standard error, since standard output may be read by a program."""
    print(f"raphael {command}: device {devices.describe(device)}", file=sys.stderr, flush=True)


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """Of --device, which may not be given. Raises ConfigError."""
    device = devices.resolve(arguments.device or "auto", "--device")
    say_device(arguments.command, device)
    return device


def open_pipeline(arguments: argparse.Namespace, only: str = "") -> RaphaelPipeline:
    """The checkpoint's, on --device. only: the system that the command is about; "": any. Raises ConfigError and
    StageError."""
    from raphael.base.checkpoint.folder import Stored
    from raphael.generate.pipeline import RaphaelPipeline

    folder = chosen(arguments)
    if only:
        expect_system(Stored(folder).meta, folder, only)
    pipeline = RaphaelPipeline.from_pretrained(folder, device=devices.resolve(arguments.device, "--device"))
    say_device(arguments.command, pipeline.device)
    load_adapters(pipeline, getattr(arguments, "lora", []))
    return pipeline


def add_lora(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora",
        type=weighted_file,
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a low-rank adapter, and how much of it (default: 1); may be repeated",
    )


def weighted_file(text: str) -> tuple[Path, float]:
    """ "a.safetensors:0.8" -> (a.safetensors, 0.8)."""
    file, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or weight.endswith(".safetensors"):
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not file or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected FILE or FILE:WEIGHT, the weight a finite number")
    return Path(file), value


def load_adapters(pipeline: RaphaelPipeline, chosen: list[tuple[Path, float]]) -> None:
    """Load them all, each with its weight. Raises StageError."""
    for number, (file, _) in enumerate(chosen):
        pipeline.load_lora_weights(file, str(number))
    if chosen:
        pipeline.set_adapters([str(number) for number in range(len(chosen))], [weight for _, weight in chosen])


def chosen(arguments: argparse.Namespace) -> Path:
    """The pipeline folder that the arguments name, or the default, of which one line is said on standard error."""
    from raphael.pretrained.find import default_pipeline, find_pipeline

    if arguments.checkpoint:
        return find_pipeline(arguments.checkpoint)
    folder, note = default_pipeline()
    if note:
        print(f"raphael {arguments.command}: {note}", file=sys.stderr)
    return folder


def fitted(pipeline: RaphaelPipeline, path: Path, size_px: tuple[int, int] | None = None) -> np.ndarray:
    """A picture, uint8 (H, W, 3), scaled and cropped to (height, width), None: the size that the model draws first.

    Raises StageError.
    """
    from raphael.base.images.colours import as_seen
    from raphael.base.images.fit import fit, read_image
    from raphael.generate.pipeline import default_size

    height, width = size_px or default_size(pipeline.meta["picture"])
    return read_image(path, lambda image: fit(as_seen(image), height, width))


def add_sampling(command: argparse.ArgumentParser) -> None:
    """An option for each field of `Sampling`, not given: None."""
    hints = typing.get_type_hints(Sampling)
    for field in fields(Sampling):
        command.add_argument(f"--{field.name.replace('_', '-')}", **_accepted(hints[field.name]), help=_help(field))


def chosen_sampling(arguments: argparse.Namespace, defaults: Sampling) -> Sampling:
    """What was asked for, over the model's own `defaults`. Raises ConfigError."""
    asked = {field.name: getattr(arguments, field.name) for field in fields(Sampling)}
    asked = UNASKED | {name: value for name, value in asked.items() if value is not None}
    return load(Sampling, to_dict(defaults) | asked, f"raphael {arguments.command}")


def _accepted(hint: Any) -> dict[str, Any]:
    """argparse's words for a field's type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    return {"type": hint}


def _help(field: Field) -> str:
    if own := UNASKED.get(field.name):
        default = own
    else:
        told = field.default if not isinstance(field.default, tuple) else " ".join(f"{end:g}" for end in field.default)
        default = f"the model's own, or {told:g}" if isinstance(told, float) else f"the model's own, or {told}"
    return f"{field.metadata['help']} (default: {default})".replace("%", "%%")
