"""open_clip's CLIP: built small from our settings, saved as a plain folder, loaded from that or by arch and weights.

    models/clip/config.json         {"format": "open_clip", "model": {...}, "context_length": 32, "mean": [...], ...}
    models/clip/model.safetensors

Of a large table of tokens a small file holds the rows that are used, and one for all other tokens (token_rows.py).

The tokenizer is open_clip's byte-pair one, whose vocabulary ships with the package: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raphael.base.config.params import ClipConfig
from raphael.base.stage import read_json, write_json
from raphael.encoders.light.clip_text import text_tower, tokenizer_module
from raphael.encoders.pretrained import CONFIG, PretrainedError, one_line
from raphael.encoders.token_rows import whole_table

FORMAT = "open_clip"
WEIGHTS = "model.safetensors"
MAX_CHARS = 1 << 16  # of a text, for more than any context holds; a tokenizer takes minutes over 100 MB
VISION_HEAD_WIDTH = 32  # of the small vision towers built here
OPEN_CLIP_TOKEN_STD = 0.02  # how open_clip starts the token vectors
# Mean and standard deviation of RGB in [0,1], of CLIP's own training images (openai/CLIP clip.py)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class OpenClip:
    """A CLIP with what belongs to it. tokenize: list of texts -> int64 (B, context_length)."""

    model: nn.Module
    tokenizer: Any
    context_length: int
    image_size_px: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    settings: dict[str, Any] | None = None  # the constructor's arguments; None where only a name is known

    def tokenize(self, texts: list[str]) -> Tensor:
        return self.tokenizer([text[:MAX_CHARS] for text in texts], context_length=self.context_length)


def build_clip(config: ClipConfig) -> OpenClip:
    """A CLIP with random weights (torch's global generator)."""
    if config.text_width % config.text_heads:
        sizes = f"text_width {config.text_width}, expected a multiple of text_heads {config.text_heads}"
        raise ValueError(f"clip: got {sizes}; set them in params.yaml")
    settings = {
        "embed_dim": config.embed_dim,
        "vision_cfg": _vision_settings(config),
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": _tokenizer().vocab_size,
            "width": config.text_width,
            "heads": config.text_heads,
            "layers": config.text_layers,
        },
    }
    clip = _assemble(settings)
    with torch.no_grad():
        clip.model.token_embedding.weight.mul_(config.token_std / OPEN_CLIP_TOKEN_STD)
    return clip


def _vision_settings(config: ClipConfig) -> dict[str, Any]:
    got = f"image_tower {config.image_tower}, image_size_px {config.image_size_px}, image_width {config.image_width}"
    got += f", patch_size_px {config.patch_size_px}"
    settings = {"image_size": config.image_size_px, "width": config.image_width, "head_width": VISION_HEAD_WIDTH}
    if config.image_tower == "resnet":
        # its stem halves the image twice, three of its stages once
        if config.image_size_px % 32 or config.image_width % 2 or config.patch_size_px:
            raise ValueError(
                f"clip: got {got}; a resnet wants a size that is a multiple of 32, an even width and patch_size_px 0; "
                "set them in params.yaml"
            )
        return {**settings, "layers": (config.image_layers,) * 4}
    if not config.patch_size_px or config.image_size_px % config.patch_size_px:
        raise ValueError(f"clip: got {got}; a vit wants a size that is a multiple of patch_size_px")
    if config.image_width % VISION_HEAD_WIDTH:
        raise ValueError(f"clip: got {got}; a vit wants a width that is a multiple of {VISION_HEAD_WIDTH}")
    return {**settings, "layers": config.image_layers, "patch_size": config.patch_size_px}


def save_clip(clip: OpenClip, folder: Path) -> None:
    """Write config.json and model.safetensors. Equal weights give equal bytes."""
    from safetensors.torch import save_file

    assert clip.settings is not None, "a CLIP known only by its name is not saved but pointed at"
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    config = {"format": FORMAT, "model": clip.settings, "context_length": clip.context_length}
    write_json(folder / CONFIG, {**config, "mean": list(clip.mean), "std": list(clip.std)})


def is_clip_folder(folder: str | Path) -> bool:
    """Whether the folder's config.json says that `save_clip` wrote it."""
    path = Path(folder).expanduser() / CONFIG
    return path.is_file() and read_json(path).get("format") == FORMAT


def load_clip_folder(folder: str | Path, text_only: bool = False) -> OpenClip:
    """In evaluation mode, frozen, float32, whatever type is stored. Raises PretrainedError, one line.

    text_only: its text tower is enough; the model is a TextTower where it can be, which spares importing open_clip.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    config = read_json(folder / CONFIG)
    try:
        tokenizer, model = _tokenizer(), config["model"]
        tensors = whole_table(load_file(folder / WEIGHTS), tokenizer.vocab_size)
        tower = text_tower(model, tensors) if text_only else None
        clip = _assemble(model, tuple(config["mean"]), tuple(config["std"]), tower, tokenizer)
        if tower is None:
            clip.model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OSError) as error:
        detail = " ".join(str(error).split())[:200]
        raise PretrainedError(f"CLIP: {folder}: {CONFIG} and {WEIGHTS} do not fit or are damaged ({detail})") from None
    clip.model.eval().requires_grad_(False)
    return clip


def load_open_clip(arch: str, weights: str, context_length: int | None = None) -> OpenClip:
    """An architecture of open_clip's list with weights: a file, or a published tag (fetched on first use).

    Raises PretrainedError, one line.
    """
    import open_clip

    if arch not in open_clip.list_models():
        near = [name for name in open_clip.list_models() if name.lower().startswith(arch.lower()[:5])][:6]
        raise PretrainedError(f"open_clip: unknown architecture {arch!r}; near it: {', '.join(near) or 'none'}")
    if not weights:
        raise PretrainedError(f"open_clip:{arch}: got no weights, expected open_clip:{arch}:<file or published tag>")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not Path(weights).expanduser().is_file() and weights not in tags:
        known = ", ".join(tags) or "none"
        raise PretrainedError(f"open_clip:{arch}: got weights {weights!r}, expected a weights file, or one of {known}")
    where = weights if weights in tags else str(Path(weights).expanduser().parent)
    with one_line("open_clip", where, "the weights file"):
        model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=str(Path(weights).expanduser()))
    tokenizer = open_clip.get_tokenizer(arch, context_length=context_length)
    config = getattr(model.visual, "preprocess_cfg", {})
    return OpenClip(
        model.float().eval().requires_grad_(False),
        tokenizer,
        context_length or model.context_length,
        _side(model.visual.image_size),
        tuple(config.get("mean", CLIP_MEAN)),
        tuple(config.get("std", CLIP_STD)),
    )


def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """uint8 (B,H,W,3) -> float32 (B,3,H,W), each colour less its mean, divided by its standard deviation."""

    def normalise(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 (B, H, W, 3)")
        shape = (1, 3, 1, 1)
        centre = torch.tensor(mean, device=images.device).view(shape)
        spread = torch.tensor(std, device=images.device).view(shape)
        return (images.permute(0, 3, 1, 2).float() / 255 - centre) / spread

    return normalise


def _assemble(
    settings: dict[str, Any],
    mean: tuple = CLIP_MEAN,
    std: tuple = CLIP_STD,
    model: nn.Module | None = None,
    tokenizer: Any = None,
) -> OpenClip:
    if model is None:
        from open_clip import CLIP

        model = CLIP(**settings)
    length = settings["text_cfg"]["context_length"]
    side = _side(settings["vision_cfg"]["image_size"])
    return OpenClip(model, tokenizer or _tokenizer(), length, side, mean, std, settings)


def _tokenizer() -> Any:
    return tokenizer_module().SimpleTokenizer()


def _side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]
