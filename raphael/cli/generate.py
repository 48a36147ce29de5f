"""`raphael generate`: images for prompts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base import devices
from raphael.base.stage import StageError, write_json
from raphael.cli.options import add_command, add_lora, add_sampling, chosen_sampling, fitted, open_pipeline

if TYPE_CHECKING:
    import numpy as np

    from raphael.base.config.sampling import Sampling
    from raphael.generate.pipeline import Pipeline, PipelineOutput
    from raphael.systems.guides.guide import Guide

STRENGTH = 0.6  # of --image, as of `raphael edit image`


def add(commands: argparse._SubParsersAction) -> None:
    command = add_command(commands, "generate", "generate images for a prompt", _generate)
    command.add_argument("prompt", nargs="*", help="one or several prompts, each in quotes")
    command.add_argument("--prompts", type=Path, help="instead: a file of `raphael prompts`, or one prompt a line")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--num-images", type=int, default=1, help="for each prompt (default: %(default)s)")
    command.add_argument("--size", type=_size, metavar="HxW", help="px, height first (default: the first trained at)")
    command.add_argument("--negative-prompt", default="", help="what to keep away from")
    text = "begin from this picture (SDEdit); PNG, JPEG or WebP, scaled and cropped to the size that is drawn"
    command.add_argument("--image", type=Path, metavar="PICTURE", help=text)
    text = "of --image: 0 the picture, 1 the prompt (default: 0.6)"
    command.add_argument("--strength", type=float, metavar="SHARE", help=text)
    add_sampling(command)
    add_lora(command)
    text = "follow the gradients of a guide (raphael train --guide): classifier:PATH or clip:PATH"
    command.add_argument("--guidance", metavar="KIND:PATH", help=text)
    text = "how far (default: 1); --guidance-scale is another, the model's own"
    command.add_argument("--guidance-weight", type=float, metavar="W", help=text)
    devices.add_option(command)
    command.add_argument("--batch-size", type=int, default=50, help="images at a time (default: %(default)s)")
    command.add_argument(
        "--show-edges",
        action="store_true",
        help="also a sheet for each image, in OUT/inside: the edges each block predicts, where each word attends",
    )
    command.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="make N images for each and keep the one CLIP likes best"
    )
    command.add_argument("--clip", help="which CLIP judges --best-of (default: the model's own)")
    command.add_argument(
        "--from", dest="made_from", type=Path, metavar="PNG", help="instead of prompts: make this picture again"
    )
    command.add_argument(
        "--no-metadata",
        dest="metadata",
        action="store_false",
        help="PNGs that do not say how they were made",
    )
    command.add_argument("--out", type=Path, help="a folder for PNGs and images.json (default: one in generated/)")


def _size(text: str) -> tuple[int, int]:
    """HxW, "64x96" -> (64, 96)."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HxW such as 64x96")
    return int(height), int(width)


def _generate(arguments: argparse.Namespace) -> None:
    from raphael.generate.metadata import picture_sha256
    from raphael.generate.prompt_file import default_out, generate_file, listed_prompts, told_guide

    if arguments.num_images < 1:
        raise StageError(f"--num-images: got {arguments.num_images}, expected at least 1")
    if sum(map(bool, (arguments.prompt, arguments.prompts, arguments.made_from))) != 1:
        given = [name for name in ("prompt", "prompts", "made_from") if getattr(arguments, name)]
        got = "neither" if not given else "both" if len(given) == 2 else "all"
        raise StageError(
            f"got {got}, expected prompts, each in quotes, or a file of them with --prompts, or a picture with --from"
        )
    if arguments.best_of < 1 or (arguments.best_of > 1 and (arguments.prompts or arguments.show_edges)):
        raise StageError(f"--best-of: got {arguments.best_of}, expected 1 or more, of prompts, without --show-edges")
    _check_image(arguments)
    if arguments.made_from:
        _generate_again(arguments)
        return
    listed = listed_prompts(arguments) if arguments.prompts else None
    arguments.out = arguments.out or default_out(arguments)
    pipeline = open_pipeline(arguments)
    if arguments.show_edges and not pipeline.can_look_inside:
        raise StageError(f"--show-edges: got it for the system {pipeline.system}, which has no maps; leave it out")
    sampling = chosen_sampling(arguments, pipeline.defaults)
    arguments.guidance = opened_guide(arguments)
    if listed:
        print(generate_file(arguments, sampling, listed, pipeline))
        return
    pipeline.batch_size = arguments.batch_size
    picture = fitted(pipeline, arguments.image, arguments.size) if arguments.image else None
    result = _call(arguments, pipeline, sampling, picture)
    begun = {"image_sha256": picture_sha256(picture), "strength": arguments.strength} if arguments.image else {}
    begun |= told_guide(arguments.guidance, arguments.guidance_weight)
    entries = _write(arguments, pipeline, sampling, result, begun)
    if arguments.show_edges:
        _write_sheets(result, entries, arguments.out / "inside")
    for entry in entries:
        print(arguments.out / entry["file"])


def opened_guide(arguments: argparse.Namespace) -> Guide | None:
    """Of --guidance. Raises StageError."""
    from raphael.systems.guides.guide import load_guide

    if arguments.guidance is not None:
        return load_guide(arguments.guidance)
    if arguments.guidance_weight is not None:
        got = f"{arguments.guidance_weight:g} without --guidance"
        raise StageError(f"--guidance-weight: got {got}, expected classifier:PATH or clip:PATH there")
    return None


def _check_image(arguments: argparse.Namespace) -> None:
    """Raises StageError. --strength is a number from here on."""
    if arguments.image and arguments.prompts:
        raise StageError("--image: got it with --prompts, expected the prompts themselves")
    if arguments.strength is not None and (arguments.made_from or not arguments.image):
        expected = "the picture's own" if arguments.made_from else "--image, a picture to begin from"
        raise StageError(f"--strength: got {arguments.strength:g}, expected {expected}")
    arguments.strength = STRENGTH if arguments.strength is None else arguments.strength


def _call(
    arguments: argparse.Namespace, pipeline: Pipeline, sampling: Sampling, picture: np.ndarray | None
) -> PipelineOutput:
    height, width = arguments.size or (None, None)
    named = {
        "negative_prompt": arguments.negative_prompt or None,
        "num_images_per_prompt": arguments.num_images,
        "sampling": sampling,
        "guidance": arguments.guidance,
        "guidance_weight": arguments.guidance_weight,
        "seed": arguments.seed,
        "image": picture,
        "strength": arguments.strength,
        "height": height,
        "width": width,
    }
    if arguments.best_of > 1:
        return pipeline.best_of(arguments.best_of, arguments.prompt, clip=arguments.clip, **named)
    return pipeline(arguments.prompt, collect=arguments.show_edges, **named)


def _write(
    arguments: argparse.Namespace,
    pipeline: Pipeline,
    sampling: Sampling,
    result: PipelineOutput,
    begun: dict[str, Any],
) -> list[dict[str, Any]]:
    """PNGs and images.json. begun: of image to image, what they began from, and of the guide. -> its entries."""
    from raphael.generate.metadata import Made, batch_of, chunk
    from raphael.generate.prompt_file import settings_used

    arguments.out.mkdir(parents=True, exist_ok=True)
    size_px, entries = (result.images[0].height, result.images[0].width), []
    each = arguments.num_images * arguments.best_of
    prompts = [prompt for prompt in arguments.prompt for _ in range(each)]
    for number, image in enumerate(result.images):
        index = number if result.indices is None else result.indices[number]
        name = f"{number:05d}.png"
        first, batch = batch_of(prompts, index, arguments.batch_size)
        made = (pipeline.identity, arguments.seed, first, index - first, batch)
        info = Made(*made, arguments.negative_prompt, sampling, size_px, **begun)
        image.save(arguments.out / name, pnginfo=chunk(info) if arguments.metadata else None)
        scored = {} if result.scores is None else {"clip_score": result.scores[number]}
        entries.append({"file": name, "prompt": prompts[index], "index": index, **scored})
    settings = {**settings_used(arguments, sampling, size_px, pipeline.device), **pipeline.told_adapters(), **begun}
    write_json(arguments.out / "images.json", {"model": pipeline.identity, "settings": settings, "images": entries})
    return entries


def _generate_again(arguments: argparse.Namespace) -> None:
    from raphael.generate.again import make_again
    from raphael.generate.metadata import chunk, read_made

    made = read_made(arguments.made_from)
    if changed := [
        f"--{name.replace('_', '-')}" for name in vars(made.sampling) if getattr(arguments, name) is not None
    ]:
        raise StageError(f"--from: got {changed[0]} with it, expected the picture's own settings alone")
    if arguments.guidance_weight is not None:
        raise StageError("--from: got --guidance-weight with it, expected the picture's own settings alone")
    pipeline = open_pipeline(arguments)
    height, width = made.size_px
    picture = fitted(pipeline, arguments.image, (height, width)) if arguments.image else None
    image = make_again(pipeline, made, picture, arguments.guidance)
    arguments.out = arguments.out or Path("generated") / f"{arguments.made_from.stem}-again"
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{made.first + made.row:05d}.png"
    image.save(file, pnginfo=chunk(made) if arguments.metadata else None)
    print(file)


def _write_sheets(result: PipelineOutput, entries: list[dict], folder: Path) -> None:
    import numpy as np

    from raphael.evaluate.report.inside_sheet import inside_sheet

    folder.mkdir(exist_ok=True)
    for row, (entry, image) in enumerate(zip(entries, result.images, strict=True)):
        inside_sheet(np.asarray(image), entry["prompt"], result.insight, row).save(folder / entry["file"])
        print(folder / entry["file"])
