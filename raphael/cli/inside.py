"""`raphael routes`, `raphael figures`: how words and timesteps go through the experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from raphael.base import devices
from raphael.base.config.systems import DEFAULT, find_system
from raphael.base.stage import write_json
from raphael.cli.options import add_command, open_pipeline


def add(commands: argparse._SubParsersAction) -> None:
    command = add_command(commands, "routes", "which experts a prompt's words, and the timesteps, go through", _routes)
    command.add_argument("prompt")
    devices.add_option(command)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command.add_argument("--out", type=Path, default=Path("routes.json"), help="where to save (default: %(default)s)")

    text = "draw what diffusion does to an image, and how words and timesteps spread over the experts"
    command = add_command(commands, "figures", text, _figures)
    command.add_argument("--prompts", type=Path, help="one a line, or data/source/prompts.json; default: a small list")
    devices.add_option(command)
    command.add_argument("--num-words", type=int, default=24, help="the most frequent ones (default: %(default)s)")
    command.add_argument("--prompt", help="of the strips x_0 to x_T and back (default: one that the system knows)")
    command.add_argument("--seed", type=int, default=0, help="of the strips (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("reports/figures"), help="default: %(default)s")


def _routes(arguments: argparse.Namespace) -> None:
    import json

    from raphael.evaluate.report.routes import routes_text, time_table, token_routes

    pipeline = open_pipeline(arguments, DEFAULT)
    words = token_routes(pipeline, arguments.prompt)
    every = time_table(pipeline, pipeline.diffusion.num_steps)
    length = pipeline.unet.num_blocks
    saved = {"prompt": arguments.prompt, "model": pipeline.identity, "path_length": length, "words": words}
    write_json(arguments.out, {**saved, "times": every})
    if arguments.json:
        print(json.dumps({**saved, "times": time_table(pipeline)}, ensure_ascii=False))
        return
    print(routes_text(arguments.prompt, words, time_table(pipeline)))
    print(f"\na path has {length} entries, one a block; it depends on the prompt alone, so no image was generated")
    print(f"saved to {arguments.out}: paths, and the time expert of every timestep in every block")


def _figures(arguments: argparse.Namespace) -> None:
    from raphael.evaluate.report.route_figures import PROMPTS, read_prompts, write_figures
    from raphael.evaluate.studies.strips import write_strips

    prompts = read_prompts(arguments.prompts) if arguments.prompts else list(PROMPTS)
    pipeline = open_pipeline(arguments)
    prompt = find_system(pipeline.system).asked if arguments.prompt is None else arguments.prompt
    for path in write_strips(pipeline, arguments.out, prompt, arguments.seed):
        print(f"{path} (numbers: strips.json)")
    if pipeline.system != DEFAULT:
        return
    for path in write_figures(pipeline, arguments.out, prompts, arguments.num_words):
        print(f"{path} (numbers: {path.with_suffix('.json').name}, {path.with_suffix('.csv').name})")
