"""Where tensors are computed: the setting `device` of params.yaml and of --device, and what it comes to here.

auto: the GPU where torch sees one, else the CPU. A device changes no result beyond rounding, so it is no part of what
work is known by: a run that began on a CPU resumes on a GPU, and no stage is out of date because of it.

Importing this costs nothing: torch is imported when a device is asked for.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Literal, get_args

from raphael.base.strict import ConfigError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda"]
GPU = "cuda"  # torch's name of it, AMD's included


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def resolve(setting: str = "auto", key: str = "device") -> torch.device:
    """The device that a setting means on this machine. key: what the message calls the setting.

    Raises ConfigError, one line: an unknown name, or a GPU that is not there.
    """
    import torch

    if setting not in get_args(DeviceName):
        raise ConfigError(f"{key}: got {setting!r}, expected one of {', '.join(get_args(DeviceName))}")
    if setting == "cpu" or setting == "auto" and not has_gpu():
        return torch.device("cpu")
    if not has_gpu():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"
        raise ConfigError(
            f"{key}: got {setting}, but torch {torch.__version__} ({built}) sees no GPU here; set it to auto or cpu, "
            "or look at nvidia-smi: the driver must be as new as that CUDA"
        )
    return torch.device(GPU)


def describe(device: torch.device) -> str:
    """ "cpu", or "cuda (NVIDIA H200)": for the first line of a stage."""
    import torch

    named = device.type == "cuda" and torch.cuda.is_available()  # it may be of a cluster, and not here
    return f"{device} ({torch.cuda.get_device_name(device)})" if named else str(device)


def add_option(parser: argparse.ArgumentParser, default: str | None = "auto", more: str = "") -> None:
    """--device. default None: another setting decides, which `more` names."""
    about = more or "the default, auto, is the GPU where there is one"
    parser.add_argument("--device", choices=get_args(DeviceName), default=default, help=f"where to compute: {about}")
