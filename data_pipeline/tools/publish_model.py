"""Make of a trained pipeline folder one that comes with the package: small, with its settings, its card and its check.

    python -m data_pipeline.tools.publish_model models/raphael --out raphael/pretrained/scenes

Its workspace must have been evaluated (dvc repro): numbers and settings of sampling are those of reports/evaluate.json.
Stored are the EMA weights: matrices in bfloat16, gates, norms and biases in float32; the autoencoder as it is; the
text encoder with one row for all tokens that no caption has. The card is README.md; the check, reference images and
prompts with their verdicts, is made anew with every publication.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.config.sampling import own_sampling
from raphael.base.files import put
from raphael.base.stage import StageError, one_clear_line, read_json, write_json
from raphael.base.strict import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 24 << 20  # it stays in every clone
CHECKED_PROMPTS = 40  # evenly spread over the evaluated ones
REFERENCES = 10  # images kept, of every fourth of those


@dataclass(frozen=True)
class Source:
    """A trained pipeline and what its workspace tells of it."""

    folder: Path
    workspace: Path
    identity: str
    meta: dict[str, Any]
    evaluation: dict[str, Any]  # reports/evaluate.json
    prompts: list[dict[str, Any]]  # data/generated/images.json, as they were sampled


def publish(folder: Path, out: Path, before: list[Path], machine: str = "") -> Path:
    """Write `out` atomically. before: workspaces of the trainings that it began from, the first first.

    machine: what it was trained on; "": what this is. Raises StageError where the evaluation is absent or of another
    model, where it would be too large, and where its images are worse than they should be.
    """
    from data_pipeline.tools.model_card import history, write_card
    from raphael.base.checkpoint.folder import write_checkpoint
    from raphael.base.integrity.contents import seal

    source = read_source(folder)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        weights, about = stored_weights(source)
        write_checkpoint(temporary, {"ema": weights}, about)
        shutil.copytree(source.folder / "autoencoder", temporary / "autoencoder")
        store_text_encoder(source, temporary / "text_encoder")
        check = write_check(source, temporary)
        write_card(temporary, source.evaluation, about, check, history([*before, source.workspace], machine))
        seal(temporary)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        if size > MAX_BYTES:
            raise StageError(f"{out}: got {size:,} bytes, expected at most {MAX_BYTES:,}: train a smaller preset")
        if out.exists():
            shutil.rmtree(out)
        put(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"publish_model: {out}: {size / 2**20:.1f} MB; card: {out / 'README.md'}")
    return out


def read_source(folder: Path) -> Source:
    """Raises StageError where the workspace has no evaluation of this very model."""
    from raphael.base.checkpoint.folder import read_checkpoint
    from raphael.base.integrity.contents import model_sha256
    from raphael.pretrained.find import find_pipeline

    found = find_pipeline(folder).resolve()
    workspace = found.parents[1]
    if not (workspace / "params.yaml").is_file():
        raise StageError(f"{folder}: got a pipeline outside a workspace, expected WORKSPACE/models/raphael")
    identity, evaluation = model_sha256(found)[:16], read_json(workspace / "reports/evaluate.json")
    if evaluation["model"] != identity:
        raise StageError(
            f"{workspace}/reports/evaluate.json: is of model {evaluation['model']}, expected {identity}: dvc repro"
        )
    generated = read_json(workspace / "data/generated/images.json")
    if generated["model"] != identity or generated["settings"] != evaluation["settings"]:
        raise StageError(f"{workspace}/data/generated: is not what was evaluated: dvc repro")
    return Source(found, workspace, identity, read_checkpoint(found, [])[1], evaluation, generated["images"])


def stored_weights(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The EMA weights as they are stored, and meta.json."""
    from raphael.base.checkpoint.folder import read_checkpoint
    from raphael.generate.pipeline import is_halved

    groups, meta = read_checkpoint(source.folder, ["ema"])
    weights = {name: x.bfloat16() if is_halved(name, x) else x for name, x in groups["ema"].items()}
    return weights, {**meta, "sampling": own_sampling(source.evaluation["settings"]), "published_from": source.identity}


def store_text_encoder(source: Source, out: Path) -> None:
    """The CLIP with one row for tokens that no caption has. Its text tower stays float32: conditions and routes are
    then the very ones that the network was trained with; only the image tower, which samples nothing, is halved.

    The same encoder gives the same bytes. Raises StageError for a text encoder of another kind.
    """
    from safetensors.torch import load_file, save_file

    from data_pipeline.tools.scene_tokens import scene_token_ids, seen_token_ids
    from raphael.encoders.clip import CONFIG, WEIGHTS, is_clip_folder, load_clip_folder
    from raphael.encoders.token_rows import shared_table, whole_table

    home = source.folder / "text_encoder"
    if not is_clip_folder(home):
        raise StageError(f"{home}: got a text encoder from elsewhere, expected one that the stage clip trained")
    clip = load_clip_folder(home)
    prompts = [entry["prompt"] for entry in source.prompts]
    seen = seen_token_ids(source.workspace / "data/records", clip.tokenize, prompts)
    tensors = whole_table(load_file(home / WEIGHTS), clip.tokenizer.vocab_size)
    tensors = shared_table(tensors, scene_token_ids(clip.tokenize, seen))
    halved = {name: x.bfloat16() if _of_image_tower(name, x) else x for name, x in tensors.items()}
    out.mkdir()
    save_file({name: halved[name].contiguous() for name in sorted(halved)}, out / WEIGHTS)
    shutil.copy2(home / CONFIG, out / CONFIG)


def _of_image_tower(name: str, tensor: Tensor) -> bool:
    return name.startswith("visual.") and tensor.is_floating_point() and tensor.ndim > 1


def write_check(source: Source, folder: Path) -> dict[str, Any]:
    """Sample the checked prompts with what was stored and with what was trained; write check.json and reference/.

    Raises StageError where the stored model's images are worse than its evaluation says.
    """
    from PIL import Image

    from raphael.evaluate.scenes import reference
    from raphael.generate.pipeline import RaphaelPipeline

    jobs, seed = source.prompts, source.evaluation["settings"]["seed"]
    if len(jobs) < CHECKED_PROMPTS or not all(job.get("truth") for job in jobs):
        raise StageError(f"data/generated: got {len(jobs)} images, expected {CHECKED_PROMPTS} with their truth")
    entries = [jobs[place * len(jobs) // CHECKED_PROMPTS] for place in range(CHECKED_PROMPTS)]
    stored = RaphaelPipeline.from_pretrained(folder)
    trained = RaphaelPipeline.from_pretrained(source.folder)
    trained.defaults = stored.defaults
    generated, before = (reference.draw(pipeline, entries, seed) for pipeline in (stored, trained))
    if apart := reference.outside(entries, generated, source.evaluation):
        raise StageError(f"{folder}: generates otherwise than was evaluated: {'; '.join(apart)}")
    places = list(range(0, CHECKED_PROMPTS, CHECKED_PROMPTS // REFERENCES))
    (folder / reference.IMAGES).mkdir()
    for place in places:
        Image.fromarray(generated.images[place]).save(folder / reference.IMAGES / f"{place:02d}.png", optimize=True)
    verdicts = reference.verdicts(entries, generated)
    off = reference.difference(generated.images, before.images)
    check = {
        "seed": seed,
        "prompts": [{name: entry[name] for name in ("prompt", "suite", "truth", "index")} for entry in entries],
        "verdicts": verdicts,
        "references": places,
        "numbers": {name: value for name, value in source.evaluation.items() if "_accuracy" in name},
        "stored_and_trained": {
            "mean_difference": round(float(off.mean()), 4),
            "largest_difference": round(float(off.max()), 4),
            "same_verdicts": round(reference.agreement(verdicts, reference.verdicts(entries, before)), 4),
        },
    }
    write_json(folder / reference.CHECK, check)
    return check


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="publish_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path, help="WORKSPACE/models/raphael")
    parser.add_argument("--out", type=Path, required=True, help="raphael/pretrained/NAME; replaced where it is there")
    parser.add_argument(
        "--before", type=Path, action="append", default=[], metavar="WORKSPACE", help="that it began from; repeatable"
    )
    parser.add_argument("--machine", default="", help="that it was trained on (default: what this one says of itself)")
    arguments = parser.parse_args(argv)
    with one_clear_line("publish_model") as outcome:
        try:
            publish(arguments.pipeline, arguments.out, arguments.before, arguments.machine)
        except (StageError, ConfigError):
            raise
        except ValueError as error:
            raise StageError(str(error)) from error
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
