"""`raphael edit KIND`: images changed while they are drawn, each beside its source and the same without the edit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base import devices
from raphael.cli.options import add_command, add_lora, add_sampling, chosen_sampling, fitted, open_pipeline

if TYPE_CHECKING:
    import numpy as np

    from raphael.edit.run import Edited, How
    from raphael.generate.pipeline import Pipeline

Act = Callable[["Pipeline", argparse.Namespace, "How"], "Edited"]


def add(commands: argparse._SubParsersAction) -> None:
    text = "change an image while it is drawn: the result beside its source and the same without the edit"
    command = commands.add_parser("edit", help=text, description=text.capitalize() + ".")
    kinds = command.add_subparsers(dest="kind", required=True, metavar="KIND")
    _add_switch(kinds)
    _add_known(kinds)
    _add_rewrite(kinds)
    _add_paint(kinds)
    _add_vary(kinds)
    _add_sheets(kinds)
    _add_maps(kinds)


def _kind(kinds: argparse._SubParsersAction, name: str, text: str, edit: Act) -> argparse.ArgumentParser:
    """A kind of edit with the options that all have."""
    command = _options(add_command(kinds, name, text, lambda arguments: _edit(arguments, edit)))
    command.add_argument("--num-images", type=int, default=1, help="of (seed, 0), (seed, 1), ... (default: 1)")
    return command


def _options(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--negative-prompt", default="", help="what to keep away from")
    command.add_argument("--out", type=Path, help="a folder for what is written (default: edited/KIND)")
    devices.add_option(command)
    add_sampling(command)
    add_lora(command)
    return command


def _edit(arguments: argparse.Namespace, edit: Act) -> None:
    from raphael.edit.run import How

    pipeline = open_pipeline(arguments)
    sampling = chosen_sampling(arguments, pipeline.defaults)
    how = How(arguments.seed, arguments.num_images, sampling, arguments.negative_prompt)
    for file in edit(pipeline, arguments, how).save(arguments.out or Path("edited") / arguments.kind):
        print(file)


def _add_switch(kinds: argparse._SubParsersAction) -> None:
    def edit(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.switch import switch

        return switch(pipeline, asked.prompt, asked.then, asked.share, how)

    command = _kind(kinds, "switch", "one prompt for the first steps, another for the rest", edit)
    command.add_argument("prompt")
    command.add_argument("--then", required=True, metavar="PROMPT", help="the prompt of the later steps")
    command.add_argument("--share", type=float, default=0.3, help="of the steps that see the first (default: 0.3)")


def _add_known(kinds: argparse._SubParsersAction) -> None:
    def image(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.known import image_to_image

        return image_to_image(pipeline, fitted(pipeline, asked.image), asked.prompt, asked.strength, how)

    def inpaint(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.known import inpaint

        picture, mask = fitted(pipeline, asked.image), _mask(pipeline, asked.mask, asked.image)
        return inpaint(pipeline, picture, mask, asked.prompt, how, asked.feather, asked.strength)

    def outpaint(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.base.images.fit import read_image
        from raphael.edit.known import outpaint

        return outpaint(pipeline, read_image(asked.image), asked.prompt, tuple(asked.margins), how)

    command = _kind(kinds, "image", "draw a picture anew, keeping what is left of it under noise", image)
    _picture(command, "what it shall show")
    command.add_argument("--strength", type=float, default=0.6, help="0: the picture; 1: the prompt (default: 0.6)")
    command = _kind(kinds, "inpaint", "draw a masked part of a picture anew; an object goes, or another comes", inpaint)
    _picture(command, "what the whole picture shall show; to remove an object: all but the object")
    command.add_argument("--mask", type=Path, required=True, help="an image of the same size, white where to draw")
    command.add_argument("--feather", type=int, default=4, help="px around the mask that are mixed (default: 4)")
    text = "below 1 the hole begins as the ground around it: to remove an object, 0.4 (default: 1)"
    command.add_argument("--strength", type=float, default=1.0, help=text)
    command = _kind(kinds, "outpaint", "draw what lies around a picture", outpaint)
    _picture(command, "what the whole picture shall show")
    names = ("TOP", "RIGHT", "BOTTOM", "LEFT")
    command.add_argument("--margins", type=int, nargs=4, metavar=names, required=True, help="px to add")


def _add_rewrite(kinds: argparse._SubParsersAction) -> None:
    def rewrite(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit import rewrite

        image = fitted(pipeline, asked.image) if asked.image else None
        return getattr(rewrite, asked.kind)(pipeline, asked.prompt, asked.target, how, _keep(asked), image)

    def reweight(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit import rewrite

        return rewrite.reweight(pipeline, asked.prompt, dict(asked.word), how, _keep(asked))

    texts = {
        "replace": "exchange words one for one and keep the layout",
        "refine": "add words or take some away and keep the layout",
        "reweight": "make words of a prompt louder or softer",
    }
    for name, text in texts.items():
        command = _kind(kinds, name, text, reweight if name == "reweight" else rewrite)
        command.add_argument("prompt")
        if name == "reweight":
            command.add_argument("--word", type=_valued, action="append", required=True, metavar="WORD=FACTOR")
        else:
            command.add_argument("target", help="the prompt after the edit")
            command.add_argument("--image", type=Path, help="a picture that the prompt describes")
        cross, above, bound = ("1", "0.6", "these; no word: no bound") if name == "replace" else ("", "", "")
        text = f"share of the steps with the source's maps (0.8{_of_colours(cross)})"
        command.add_argument("--cross", type=float, help=text)
        command.add_argument(
            "--cross-of", type=_valued, action="append", default=[], metavar="WORD=SHARE", help="another for a word"
        )
        text = f"the same of self-attention (0.4{_of_colours(cross)})"
        command.add_argument("--self-attention", type=float, help=text)
        command.add_argument("--self-map", type=float, help="on maps up to this share of the largest (1)")
        text = f"stay the source outside of these (no such bound{_of_colours(bound)})"
        command.add_argument("--blend", nargs="*", metavar="WORD", help=text)
        text = f"this share of the greatest (0.3{_of_colours(above)})"
        command.add_argument("--blend-above", type=float, help=text)


def _of_colours(default: str) -> str:
    return default and f"; colours for colours: {default}"


def _add_paint(kinds: argparse._SubParsersAction) -> None:
    def paint(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.paint import paint

        regions = {phrase: _white(fitted(pipeline, path)) for phrase, path in asked.region}
        return paint(pipeline, asked.prompt, regions, asked.weight, how, asked.away, asked.arrange)

    command = _kind(kinds, "paint", "draw phrases of a prompt where they are painted", paint)
    command.add_argument("prompt")
    text = "a phrase of the prompt, and an image that is white where it shall be"
    command.add_argument("--region", type=_region, action="append", required=True, metavar="PHRASE=MASK", help=text)
    command.add_argument("--weight", type=float, default=0.5, help="of the painting; 0: none (default: 0.5)")
    text = "how much less a phrase is looked at outside its region; 0: eDiff-I's painting (default: 1)"
    command.add_argument("--away", type=float, default=1.0, help=text)
    text = "steps by which the seed's noise is rearranged to suit; 0: it stays (default: 3)"
    command.add_argument("--arrange", type=int, default=3, metavar="STEPS", help=text)


def _add_vary(kinds: argparse._SubParsersAction) -> None:
    def vary(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.vary import variations

        return variations(pipeline, asked.prompt, asked.strength, how)

    def interpolate(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.vary import interpolate

        return interpolate(pipeline, asked.prompt, asked.to, asked.to_seed, how)

    def reconstruct(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.invert import reconstruct

        return reconstruct(pipeline, fitted(pipeline, asked.image), asked.prompt, how)

    command = _kind(kinds, "vary", "images like the seed's own", vary)
    command.add_argument("prompt")
    command.add_argument("--strength", type=float, default=0.3, help="0: the image; 1: another seed's (default: 0.3)")
    command = _kind(kinds, "interpolate", "images from one prompt or seed to another", interpolate)
    command.add_argument("prompt")
    command.add_argument("--to", metavar="PROMPT", help="the other prompt")
    command.add_argument("--to-seed", type=int, metavar="SEED", help="the other seed")
    command = _kind(kinds, "reconstruct", "the noise that draws a picture, and what is drawn from it", reconstruct)
    _picture(command, "what it shows")


def _add_sheets(kinds: argparse._SubParsersAction) -> None:
    def styles(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.sheets import style_sheet

        return style_sheet(pipeline, asked.prompt, asked.style, how)

    def grid(pipeline: Any, asked: argparse.Namespace, how: Any) -> Any:
        from raphael.edit.sheets import Grid, axis_of

        axes = (axis_of(text) for text in (asked.x, asked.y, asked.z) if text)
        return Grid(pipeline, asked.prompt, tuple(axes), how)

    command = _kind(kinds, "styles", "one prompt and one seed in every style", styles)
    command.add_argument("prompt")
    text = "words to put behind the prompt, or a text with {prompt} in it; again for another"
    command.add_argument("--style", action="append", required=True, help=text)
    command = _kind(kinds, "grid", "a labelled grid over one to three settings; killed, the same command goes on", grid)
    command.add_argument("prompt")
    text = "NAME=VALUES, such as steps=5,15,30; seed=0-3; prompt=a|b; replace=red|blue"
    command.add_argument("--x", required=True, metavar="AXIS", help=text)
    command.add_argument("--y", metavar="AXIS")
    command.add_argument("--z", metavar="AXIS", help="a sheet for each value")


def _add_maps(kinds: argparse._SubParsersAction) -> None:
    def act(asked: argparse.Namespace) -> None:
        from raphael.edit.pictures import write_figures

        pipeline = open_pipeline(asked)
        how = {"sampling": chosen_sampling(asked, pipeline.defaults), "negative_prompt": asked.negative_prompt}
        seen = pipeline.inspect(asked.prompt, asked.seed, **how)
        for file in write_figures(seen, asked.out or Path("edited/maps")):
            print(file)

    command = _options(add_command(kinds, "maps", "what the network does while it draws, as figures and arrays", act))
    command.add_argument("prompt")


def _region(text: str) -> tuple[str, Path]:
    phrase, _, path = text.partition("=")
    if not phrase or not path:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected PHRASE=MASK such as 'red circle=left.png'")
    return phrase, Path(path)


def _white(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: rather white."""
    return pixels.mean(2) >= 128


def _keep(asked: argparse.Namespace) -> Any:
    """The kind's own, but for what was asked for."""
    from raphael.edit.rewrite import kept

    blend = None if asked.blend is None else tuple(asked.blend)
    return kept(
        asked.kind,
        asked.prompt,
        getattr(asked, "target", ""),
        cross=asked.cross,
        self_attention=asked.self_attention,
        self_map=asked.self_map,
        by_word=dict(asked.cross_of),
        blend=blend,
        threshold=asked.blend_above,
    )


def _valued(text: str) -> tuple[str, float]:
    """WORD=NUMBER."""
    word, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not word or number != number:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WORD=NUMBER such as red=2")
    return word, number


def _picture(command: argparse.ArgumentParser, prompt: str) -> None:
    command.add_argument("image", type=Path, help="PNG, JPEG or WebP; scaled and cropped to the model's size")
    command.add_argument("prompt", help=prompt)


def _mask(pipeline: Any, path: Path, picture: Path) -> np.ndarray:
    """(H, W) bool, True where it is rather white; scaled and cropped as the picture that it is of."""
    from raphael.base.images.fit import read_image

    of, size = (read_image(file, lambda image: image.size) for file in (path, picture))
    if of != size:
        raise ValueError(f"--mask: got {of[0]} x {of[1]} px, expected the picture's {size[0]} x {size[1]}")
    return _white(fitted(pipeline, path))
