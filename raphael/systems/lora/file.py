"""Files of low-rank adapters, in the two forms that most tools read. Both hold the same matrices.

kohya   one .safetensors: lora_unet_<path, its dots as _>.lora_down.weight, .lora_up.weight and .alpha, a number.
peft    adapter_model.safetensors: base_model.model.<path>.lora_A.weight (down) and .lora_B.weight (up), and beside it
        adapter_config.json, which holds rank and alpha. diffusers writes unet.<path> for the path, and the numbers
        into the header.

<path> is the module's in our network; an expert's matrix has its bank's, w1 or w2, and its number behind that. What
files of Stable Diffusion call it: raphael/systems/lora/names.py.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raphael.base.checkpoint.folder import PICKLES
from raphael.base.files import file_sha256, written_whole
from raphael.base.stage import StageError, of_a_stranger, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from raphael.net.lora.sites import Pair, Site

Form = Literal["kohya", "peft"]
LORA_FILE = "lora.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA = re.compile(r"lora_(unet|te)\d?_(.+?)\.(lora_down\.weight|lora_up\.weight|alpha)")
PEFT = re.compile(r"(?:base_model\.model\.)?(?:(unet|text_encoder)\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
PARTS = {"unet": "unet", "te": "text_encoder", "text_encoder": "text_encoder", None: "unet"}
ROLES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "A": "down", "B": "up"}
OTHERS = {  # of LyCORIS and others: not up down
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a decomposed kernel",
    "oft_": "OFT",
}
METADATA = "lora_adapter_metadata"  # diffusers' word in the header


@dataclass(frozen=True)
class Header:
    """What a file says of itself. base: digits of the sha256 of the checkpoint that it was trained on, "" unknown."""

    base: str = ""
    rank: int = 0
    alpha: float = 0.0


@dataclass(frozen=True)
class LoraFile:
    """matrices: (part, name in the file) -> {"down", "up", "alpha"}; dotted: whether names have dots, as peft's."""

    where: str
    sha256: str
    form: Form
    dotted: bool
    matrices: dict[tuple[str, str], dict[str, Any]] = field(repr=False)
    keys: dict[tuple[str, str], str] = field(repr=False)  # a key of the file for each, for messages
    header: dict[str, str] = field(repr=False)


def write_lora(path: Path, pairs: dict[Site, Pair], header: Header, form: Form = "kohya") -> Path:
    """Write an adapter; of peft's form the file beside it, too. Returns the file. Equal pairs give equal bytes."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for site, pair in sorted(pairs.items()):
        name = name_of(site)
        if form == "kohya":
            key = f"lora_unet_{name.replace('.', '_')}"
            named = {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
            named[f"{key}.alpha"] = torch.tensor(float(pair.alpha))
        else:
            key = f"base_model.model.{name}"
            named = {f"{key}.lora_A.weight": pair.down, f"{key}.lora_B.weight": pair.up}
        tensors |= {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    said = {"format": "pt", "raphael_base": header.base, "ss_network_module": "networks.lora"}
    said |= {"ss_network_dim": str(header.rank), "ss_network_alpha": f"{header.alpha:g}"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_bytes(in_order(save(tensors, metadata=said)))
    if form == "peft":
        write_json(path.with_name(PEFT_CONFIG), peft_config(pairs, header))
    return path


def in_order(data: bytes) -> bytes:
    """A safetensors file with the texts of its header by name: safetensors writes them in an order of chance."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:8] + text.ljust(size) + data[8 + size :]


def name_of(site: Site) -> str:
    """Of a site of our own: the module's path, with an expert's number behind the bank's."""
    assert site.rows is None and site.part == "unet", site
    return site.parameter.removesuffix(".weight") if site.expert is None else f"{site.parameter}.{site.expert}"


def peft_config(pairs: dict[Site, Pair], header: Header) -> dict[str, Any]:
    """What peft's LoraConfig is read from."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": header.base,
        "r": header.rank,
        "lora_alpha": header.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(name_of(site) for site in pairs),
    }


def find_file(path: str | Path) -> Path:
    """The file of an adapter: itself, or the one in its folder. Raises StageError."""
    path = Path(path).expanduser()
    names = (LORA_FILE, PEFT_FILE, DIFFUSERS_FILE)
    if path.is_dir():
        there = [path / name for name in names if (path / name).is_file()]
        if not there:
            raise StageError(f"{path}: holds none of {', '.join(names)}, expected a LoRA file or a folder with one")
        return there[0]
    if not path.is_file():
        raise StageError(f"{path}: no such file, expected a LoRA in .safetensors")
    if path.suffix in PICKLES:
        raise StageError(f"{path}: got a pickle, which can run code when it is read: refused; expected .safetensors")
    return path


def read_lora(path: str | Path) -> LoraFile:
    """Raises StageError, one line, for what is absent, damaged, no LoRA, incomplete or not finite."""
    file = find_file(path)
    with of_a_stranger(file):
        return _read(file)


def _read(file: Path) -> LoraFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            header = stored.metadata() or {}
    except SafetensorError as error:
        raise StageError(f"{file}: damaged, or no safetensors ({error}); fetch it again") from None
    matrices: dict[tuple[str, str], dict[str, Any]] = {}
    keys: dict[tuple[str, str], str] = {}
    dotted = False
    for key, tensor in tensors.items():
        part, name, role, is_dotted = _parse(file, key)
        dotted = dotted or is_dotted
        matrices.setdefault((part, name), {})[role] = tensor
        keys[part, name] = key
        if not bool(tensor.isfinite().all()):
            raise StageError(f"{file}: {key}: got numbers that are not finite, expected a whole training's")
    if not matrices:
        raise StageError(f"{file}: got no tensors, expected a LoRA's")
    _complete(file, matrices, keys, _alphas(file, header))
    return LoraFile(str(file), file_sha256(file), "peft" if dotted else "kohya", dotted, matrices, keys, header)


def _parse(file: Path, key: str) -> tuple[str, str, str, bool]:
    """(part, name, down | up | alpha, whether the name has dots)"""
    if other := next((kind for mark, kind in OTHERS.items() if mark in key), ""):
        raise StageError(f"{file}: {key}: is {other}, expected a plain LoRA (up times down); convert it first")
    if match := KOHYA.fullmatch(key):
        return PARTS[match[1]], match[2], ROLES[match[3]], False
    if match := PEFT.fullmatch(key):
        return PARTS[match[1]], match[2], ROLES[match[3]], True
    raise StageError(
        f"{file}: got the key {key}, expected a LoRA's: kohya's lora_unet_<path>.lora_down.weight, or peft's "
        "<path>.lora_A.weight"
    )


def _alphas(file: Path, header: dict[str, str]) -> dict[str, Any]:
    """alpha, and alpha_pattern by name, of a file whose tensors do not hold it."""
    beside = file.with_name(PEFT_CONFIG)
    said: Any = {}
    if METADATA in header:
        beside = file
        try:
            said = json.loads(header[METADATA])
        except (ValueError, RecursionError):
            raise StageError(f"{file}: {METADATA}: not valid JSON; fetch it again") from None
        if isinstance(said, dict):
            prefix = "unet." if any(name.startswith("unet.") for name in said) else ""
            said = {name.removeprefix(prefix): value for name, value in said.items()}
    elif file.name == PEFT_FILE and beside.is_file():
        said = read_json(beside)
    pattern = (said.get("alpha_pattern") or {}) if isinstance(said, dict) else None
    if not isinstance(pattern, dict):
        raise StageError(f"{beside}: got something else than lora_alpha and alpha_pattern by name, expected peft's")
    return {"lora_alpha": said.get("lora_alpha"), "alpha_pattern": pattern}


def _number(file: Path, key: str, value: Any) -> float:
    """alpha, out of a tensor or of JSON. Raises StageError."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not math.isfinite(number) or isinstance(value, str | bool):
        raise StageError(f"{file}: alpha of {key}: got {str(value)[:40]}, expected a finite number")
    return number


def _complete(file: Path, matrices: dict, keys: dict, said: dict[str, Any]) -> None:
    for place, found in matrices.items():
        missing = {"down", "up"} - found.keys()
        if missing:
            raise StageError(f"{file}: {keys[place]}: got it alone, expected down and up of {place[1]}")
        down, up = found["down"], found["up"]
        if down.dim() != up.dim() or down.dim() not in (2, 4) or len(down) != up.shape[1] or not len(down):
            got = f"down {list(down.shape)} and up {list(up.shape)}"
            raise StageError(f"{file}: {keys[place]}: got {got}, expected (rank, in, ...) and (out, rank, ...)")
        # without a number of its own a file means alpha = rank, so that the factor is 1
        known = [found.get("alpha"), said["alpha_pattern"].get(place[1]), said["lora_alpha"], len(down)]
        found["alpha"] = _number(file, keys[place], next(value for value in known if value is not None))
