"""`raphael train --guide classifier|clip`: train a guide beside a model, on the records of its workspace.

A guide is a network that reads noised images: a classifier of labels, or a CLIP of captions. Its gradients turn the
sampling of the model towards a class or a text: raphael generate --guidance classifier:PATH (docs/guides/guidance.md).
The same command resumes where it stopped, bit for bit; other settings or another model train anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base import devices
from raphael.base.config import consent
from raphael.base.stage import Stage, StageError, one_clear_line, only_run, read_json, write_json
from raphael.base.strict import ConfigError
from raphael.pretrained.find import TRAINED, find_pipeline

if TYPE_CHECKING:
    from raphael.base.config.params import Config
    from raphael.base.tracking.tracker import Tracker
    from raphael.systems.guides.training import GuideJob

PLACE = "models/guides"  # as guide.py's HOME, which imports torch


def run(arguments: argparse.Namespace) -> Path:
    """Train, or resume, and publish; -> the guide's folder. Raises StageError, ConfigError, CheckpointError."""
    from raphael.base.config.params import load_config
    from raphael.base.records import Records
    from raphael.systems.guides.training import GuideJob, settings_of
    from raphael.systems.pipeline import Pipeline

    root = arguments.workspace.resolve()
    config = load_config(root / "params.yaml")
    consent.trust_settings(config)
    device = devices.resolve(arguments.device or config.device, "--device")
    print(f"guide: device {devices.describe(device)}", flush=True)
    out = root / (arguments.out or f"{PLACE}/{arguments.guide}")
    expect_guide(out)
    pipeline = Pipeline.from_pretrained(find_pipeline(arguments.checkpoint or TRAINED, root), device=device)
    records = root / "data/records"
    if not records.is_dir():
        raise StageError(f"{records}: absent; run the stages before it: cd {root} && dvc repro encode")
    settings = settings_of(arguments.guide, pipeline.space.startswith(Pipeline.space), parsed(arguments.set))
    job = GuideJob(arguments.guide, pipeline, Records(records), settings, str(root / "params.yaml"), device)
    stage = Stage(f"guide_{arguments.guide}", root)
    with only_run(stage.name, root):
        return _train(job, config, stage, out)


def _train(job: GuideJob, config: Config, stage: Stage, out: Path) -> Path:
    from raphael.base.tracking.tracker import closing
    from raphael.systems.guides.training import build, train_guide
    from raphael.train.loop import Hooks

    build(job)  # what does not fit is said before a run is begun
    work = stage.workdir(*job.identity())
    total = job.settings.loop.num_images
    with closing(tracker_of(job, config, stage.root, work)) as tracker, stage.progress(total, "images") as bar:

        def say(line: str) -> None:
            bar.bar.write(f"guide: {line}")

        def point(found: dict[str, float], images: int) -> None:
            told = f"loss {found['train/loss']:.4f}  accuracy {found.get('train/accuracy', 0):.3f}"
            say(f"{images:,}/{total:,} images  {told}  {found['train/images_per_s']:.1f} images/s")

        hooks = Hooks(progress=lambda images: bar.update(images - bar.bar.n), on_log=point, say=say)
        published = stage.publish(train_guide(job, work, hooks, tracker), out)
        tracker.artifact(published / "curves.json")
        heldout = read_json(published / "meta.json")["heldout"]
        tracker.log({f"heldout/accuracy_t/{t}": one["accuracy"] for t, one in heldout.items() if one["n"]}, total)
    for t, one in heldout.items():
        print(f"guide: held-out accuracy at timestep {t}: {one['accuracy']} (n {one['n']})", flush=True)
    return published


def expect_guide(out: Path) -> None:
    """Raises StageError for a folder that holds something else: publishing replaces it."""
    if not out.exists():
        return
    meta = out / "meta.json"
    if not (meta.is_file() and "guide" in read_json(meta)):
        raise StageError(f"--out: {out}: holds something else than a guide, expected a new folder or a guide's")


def tracker_of(job: GuideJob, config: Config, root: Path, work: Path) -> Tracker:
    """MLflow's run of this training: the one it has begun already, or a new one."""
    from raphael.base.strict import to_dict
    from raphael.base.tracking import tracker as tracking

    uri, file = tracking.resolve_uri(config, root), work / "run.json"
    known = read_json(file) if file.exists() else {}
    run_id = known.get("run_id") if known.get("uri") == tracking.public(uri) else None
    if run_id is None or not tracking.reopen_run(uri, run_id, root):
        params = {"guide": {"kind": job.kind, **to_dict(job.settings)}, "model_sha256": job.pipeline.identity}
        run_id = tracking.create_run(config, root, f"guide-{job.kind}-{work.name[:8]}", params)
        write_json(file, {"uri": tracking.public(uri), "run_id": run_id})
    return tracking.MlflowTracker(uri, run_id, tracking.journal_of(root, run_id))


def parsed(said: list[str]) -> dict[str, Any]:
    """KEY=VALUE -> {key: value}, values as YAML has them. Raises ConfigError."""
    import yaml

    found = {}
    for item in said:
        key, equals, value = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"--set: got {item!r}, expected KEY=VALUE, such as loop.num_images=9600")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set: got {item!r}, expected a value as YAML has it") from None
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="raphael train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--guide", required=True, choices=("classifier", "clip"), help="what it tells of an image")
    text = f"the model beside which it is trained: a pipeline folder, or a name (default: {TRAINED})"
    parser.add_argument("--from", dest="checkpoint", help=text)
    text = "whose data/records it is trained on (default: this folder)"
    parser.add_argument("--workspace", type=Path, default=Path("."), help=text)
    text = f"where the guide goes, on the same disk (default: {PLACE}/KIND in the workspace)"
    parser.add_argument("--out", type=Path, help=text)
    text = "one setting of raphael/systems/guides/KIND.yaml, such as loop.num_images=9600; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    devices.add_option(parser, None, "instead of what the settings say under `device`")
    consent.add_option(parser)
    with one_clear_line("guide") as outcome:
        print(f"guide: {run(parser.parse_args(argv))}")
    return outcome.status
