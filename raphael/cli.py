"""The `raphael` command. A sub-command imports its room when it is called: `raphael --help` answers at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from raphael.data_commands import add_data
from raphael.evaluate.commands import BENCHES, add_export, add_paths, add_prefer
from raphael.stage import StageError, one_clear_line, write_json
from raphael.strict import ConfigError

if TYPE_CHECKING:
    from raphael.generate.pipeline import PipelineOutput

CHECKPOINT = "models/raphael"


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
        prog="raphael", description="An open RAPHAEL: draw from a checkpoint, look into it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _generate_command(commands)
    command = _command(commands, "routes", "which experts a prompt's words, and the timesteps, go through", _routes)
    command.add_argument("prompt")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--out", type=Path, default=Path("routes.json"), help="where to save (default: %(default)s)")

    command = _command(commands, "figures", "draw how words and timesteps spread over the experts", _figures)
    command.add_argument("--prompts", type=Path, help="one a line, or data/source/prompts.json; default: a small list")
    command.add_argument("--num-words", type=int, default=24, help="the most frequent ones (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("reports/figures"), help="default: %(default)s")

    _move_commands(commands)
    command = commands.add_parser("model", help="what a preset is made of, without its weights")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="tree, parameters, FLOPs for each picture size, memory for training")
    show.add_argument("preset", help="a preset's name or file")
    show.set_defaults(act=_model_show)

    command = _command(commands, "info", "what a checkpoint or a preset is made of", _info)
    command.add_argument("--preset", default="", help="a preset's name or file, instead of a checkpoint")

    _evaluate_command(commands)
    add_data(commands)
    add_paths(commands)
    add_prefer(commands)
    command = commands.add_parser("prompts", help="write the prompts of an evaluation protocol or a public benchmark")
    chosen = command.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--protocol", help="e.g. drawbench/v1")
    chosen.add_argument("--bench", choices=BENCHES, help="those of `raphael evaluate export`")
    command.add_argument("--source", type=Path, help="the file that the protocol or benchmark has its prompts in")
    command.add_argument("--out", type=Path, required=True, help="in the form of data/source/prompts.json")
    command.set_defaults(act=_prompts)

    command = commands.add_parser("compare", help="what differs between runs: a table, and one page with curves")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run ids of MLflow, or the start of one; names too")
    command.add_argument("--params", default="params.yaml", help="where its tracking store is (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("reports/compare.html"), help="default: %(default)s")
    command.set_defaults(act=_compare)
    return parser


def _generate_command(commands: argparse._SubParsersAction) -> None:
    command = _command(commands, "generate", "draw pictures for a prompt", _generate)
    command.add_argument("prompt", nargs="*", help="one or several prompts, each in quotes")
    command.add_argument("--prompts", type=Path, help="instead: a file of `raphael prompts`, or one prompt a line")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--steps", type=int, default=30, help="denoising steps (default: %(default)s)")
    command.add_argument("--guidance-scale", type=float, default=4.0, help="1: none (default: %(default)s)")
    command.add_argument("--num-images", type=int, default=1, help="for each prompt (default: %(default)s)")
    command.add_argument("--size", type=_size, metavar="HxW", help="px, height first (default: the first trained at)")
    command.add_argument("--negative-prompt", default="", help="what to keep away from")
    _sampler_arguments(command)
    command.add_argument("--batch-size", type=int, default=50, help="pictures at a time (default: %(default)s)")
    command.add_argument(
        "--show-edges",
        action="store_true",
        help="also a sheet for each picture, in OUT/inside: the edges each block predicts, where each word attends",
    )
    command.add_argument("--out", type=Path, required=True, help="folder for the PNGs and images.json")


def _move_commands(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("export", help="write a checkpoint in a form that other programs read")
    command.add_argument("checkpoint", type=Path, help="a pipeline folder, such as models/raphael")
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command.add_argument(
        "--format", choices=("diffusers", "safetensors"), default="diffusers", help="default: %(default)s"
    )
    command.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last (default: ema)")
    command.set_defaults(act=_export)
    # its own program reads its arguments: here "-" is no sign of an option
    text = "fine-tune a checkpoint on pictures with captions: raphael train --help"
    command = commands.add_parser("train", help=text, add_help=False, prefix_chars="\0")
    command.add_argument("rest", nargs="*")
    command.set_defaults(act=_train)
    command = commands.add_parser("import", help="a Stable Diffusion of diffusers, or an export, as a pipeline folder")
    command.add_argument("source", type=Path, help="a folder of diffusers, or a file of raphael export")
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command.add_argument("--preset", default="sd", help="whose experts a Stable Diffusion gets (default: %(default)s)")
    for layer in ("time", "space"):
        command.add_argument(f"--{layer}-layer", choices=("moe", "dense", "none"), help="instead of the preset's")
    command.set_defaults(act=_import)


def _sampler_arguments(command: argparse.ArgumentParser) -> None:
    from raphael.config import SamplerName, ThresholdKind

    samplers, kinds = get_args(SamplerName), get_args(ThresholdKind)
    names = f"{', '.join(samplers[:-1])} or {samplers[-1]}"
    command.add_argument("--sampler", default="dpmpp_2m", help=f"{names} (default: %(default)s)")
    command.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 deterministic, 1 as ddpm")
    command.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=[0.0, 1.0],
        metavar=("LOW", "HIGH"),
        help="guide only there: shares of the timesteps, 0 the cleanest, 1 the noisiest (default: all)",
    )
    command.add_argument("--threshold", default="none", choices=kinds, help="for models of pixels (default: none)")
    command.add_argument("--threshold-percentile", type=float, default=99.5, help="dynamic only (default: %(default)s)")
    command.add_argument("--threshold-bound", type=float, default=1.0, help="of the data (default: %(default)s)")


def _evaluate_command(commands: argparse._SubParsersAction) -> None:
    text = "run the evaluation and the report of a workspace; with --images, measure a folder by a protocol"
    command = commands.add_parser("evaluate", help=text, description=text.capitalize() + ".")
    command.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
    command.add_argument(
        "--images", type=Path, help="a folder of pictures; images.json in it names prompts and settings"
    )
    command.add_argument("--reference", type=Path, help="a folder of real pictures")
    command.add_argument("--protocol", default="pair-debug/v1", help="docs/evaluation.md (default: %(default)s)")
    command.add_argument(
        "--features",
        action="append",
        help="inception:FILE, open_clip:ARCH:FILE, a CLIP folder, taesd:FOLDER; repeatable",
    )
    command.add_argument("--prompts", type=Path, help="one prompt a line, in the order of the pictures")
    command.add_argument("--workers", type=int, default=1, help="that share the pictures (default: %(default)s)")
    command.add_argument("--ray", action="store_true", help="workers are Ray's: of RAY_ADDRESS, or of a private Ray")
    command.add_argument("--cache", type=Path, default=Path("work/features"), help="default: %(default)s")
    command.add_argument("--out", type=Path, help="where the numbers go, as JSON")
    command.add_argument("--guidance-scale", type=float, help="of the pictures, where images.json does not say")
    command.add_argument("--sampler", help="the same")
    command.add_argument("--steps", type=int, help="the same")
    command.add_argument("--weights", help="the same: a hash of the model's weights")
    command.set_defaults(act=_evaluate)
    add_export(command)


def _command(commands: argparse._SubParsersAction, name: str, text: str, act) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
    command.add_argument("--checkpoint", default=CHECKPOINT, help="a pipeline folder (default: %(default)s)")
    command.set_defaults(act=act)
    return command


def _size(text: str) -> tuple[int, int]:
    """HxW, "64x96" -> (64, 96)."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HxW such as 64x96")
    return int(height), int(width)


def _export(arguments: argparse.Namespace) -> None:
    from raphael.generate.export import export

    print(export(arguments.checkpoint, arguments.out, arguments.format, arguments.weights))


def _train(arguments: argparse.Namespace) -> None:
    import subprocess

    status = subprocess.run([sys.executable, "-m", "flows.finetune", *arguments.rest]).returncode
    if status:
        raise StageError("its message is above")


def _import(arguments: argparse.Namespace) -> None:
    from raphael.generate.import_model import import_model

    layers = {"time_layer": arguments.time_layer, "space_layer": arguments.space_layer}
    layers = {name: layer for name, layer in layers.items() if layer}
    print(import_model(arguments.source, arguments.out, arguments.preset, layers))
    print(arguments.out)


def _generate(arguments: argparse.Namespace) -> None:
    from raphael.generate.draw_file import draw_file, drawn_with
    from raphael.generate.pipeline import RaphaelPipeline

    if arguments.num_images < 1:
        raise StageError(f"--num-images: got {arguments.num_images}, expected at least 1")
    if bool(arguments.prompt) == bool(arguments.prompts):
        got = "both" if arguments.prompt else "neither"
        raise StageError(f"got {got}, expected prompts, each in quotes, or a file of them with --prompts")
    if arguments.prompts:
        print(draw_file(arguments))
        return
    pipeline = RaphaelPipeline.from_pretrained(arguments.checkpoint)
    pipeline.sampler, pipeline.batch_size = arguments.sampler, arguments.batch_size
    pipeline.threshold, pipeline.threshold_bound = arguments.threshold, arguments.threshold_bound
    pipeline.threshold_percentile = arguments.threshold_percentile
    height, width = arguments.size or (None, None)
    result = pipeline(
        arguments.prompt,
        negative_prompt=arguments.negative_prompt or None,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        num_images_per_prompt=arguments.num_images,
        eta=arguments.eta,
        guidance_interval=tuple(arguments.guidance_interval),
        seed=arguments.seed,
        collect=arguments.show_edges,
        height=height,
        width=width,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, image in enumerate(result.images):
        name = f"{index:05d}.png"
        image.save(arguments.out / name)
        entries.append({"file": name, "prompt": arguments.prompt[index // arguments.num_images], "index": index})
    settings = drawn_with(arguments, (result.images[0].height, result.images[0].width))
    write_json(arguments.out / "images.json", {"model": pipeline.identity, "settings": settings, "images": entries})
    if arguments.show_edges:
        _write_sheets(result, entries, arguments.out / "inside")
    for entry in entries:
        print(arguments.out / entry["file"])


def _write_sheets(result: PipelineOutput, entries: list[dict], folder: Path) -> None:
    import numpy as np

    from raphael.evaluate.inside_sheet import inside_sheet

    folder.mkdir(exist_ok=True)
    for row, (entry, image) in enumerate(zip(entries, result.images, strict=True)):
        inside_sheet(np.asarray(image), entry["prompt"], result.insight, row).save(folder / entry["file"])
        print(folder / entry["file"])


def _routes(arguments: argparse.Namespace) -> None:
    import json

    from raphael.evaluate.routes import routes_text, time_table, token_routes
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(arguments.checkpoint)
    words = token_routes(pipeline, arguments.prompt)
    every = time_table(pipeline, pipeline.diffusion.num_steps)
    length = pipeline.unet.num_blocks
    saved = {"prompt": arguments.prompt, "model": pipeline.identity, "path_length": length, "words": words}
    write_json(arguments.out, {**saved, "times": every})
    if arguments.json:
        print(json.dumps({**saved, "times": time_table(pipeline)}, ensure_ascii=False))
        return
    print(routes_text(arguments.prompt, words, time_table(pipeline)))
    print(f"\na path has {length} entries, one a block; it depends on the prompt alone, so no picture was drawn")
    print(f"saved to {arguments.out}: paths, and the time expert of every timestep in every block")


def _figures(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.route_figures import PROMPTS, read_prompts, write_figures
    from raphael.generate.pipeline import RaphaelPipeline

    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(PROMPTS)
    pipeline = RaphaelPipeline.from_pretrained(arguments.checkpoint)
    for path in write_figures(pipeline, arguments.out, prompts, arguments.num_words):
        print(f"{path} (numbers: {path.with_suffix('.json').name}, {path.with_suffix('.csv').name})")


def _info(arguments: argparse.Namespace) -> None:
    from raphael.generate.info import describe_checkpoint, describe_preset

    print(describe_preset(arguments.preset) if arguments.preset else describe_checkpoint(arguments.checkpoint))


def _model_show(arguments: argparse.Namespace) -> None:
    from raphael.generate.anatomy import model_text

    print(model_text(arguments.preset))


def _evaluate(arguments: argparse.Namespace) -> None:
    import subprocess

    if arguments.images:
        from raphael.evaluate.folders import evaluate_folders

        evaluate_folders(arguments)
        return
    if arguments.reference or arguments.features or arguments.workers != 1 or arguments.ray:
        raise StageError(
            "got --reference, --features, --workers or --ray without --images, expected a folder of pictures with them"
        )

    for module in ("raphael.evaluate", "raphael.evaluate.report"):
        status = subprocess.run([sys.executable, "-m", module, "--params", arguments.params]).returncode
        if status:
            raise StageError(f"python -m {module} ended with status {status}; its message is above")


def _prompts(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.folders import write_prompts

    write_prompts(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.compare import compare_runs

    compare_runs(arguments.runs, arguments.params, arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
