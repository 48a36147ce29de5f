"""`python -m raphael.systems.raphael.snapshot OUT`: the newest checkpoint of this workspace's training as a pipeline
folder.

Beside a running training, or after one that was stopped: the stage itself writes a folder only at the end. Nothing of
the training is touched. Raises StageError where there is none, or more than one, or OUT is there already.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

from raphael.base.config.params import load_config
from raphael.base.files import put
from raphael.base.stage import StageError, one_clear_line


def snapshot(root: Path, out: Path) -> int:
    """Write models/raphael's form of the newest checkpoint below root/work/train to `out`. Returns the images seen."""
    from raphael.systems.export import finished, write_export
    from raphael.systems.job import Folders

    # not Stage.workdir: with other settings than the training's that would clear the training away
    homes = [path.parent for path in (root / "work/train").glob("*/checkpoints") if any(path.iterdir())]
    if len(homes) != 1:
        raise StageError(f"{root}/work/train: got {len(homes)} trainings with a checkpoint, expected one")
    if out.exists():
        raise StageError(f"{out}: is there already; name another place")
    (work,) = homes
    config = load_config(root / "params.yaml")
    trained = finished(config, Folders.of(root, work))
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        folders = replace(Folders.of(root, work), work=temporary)
        write_export(config, folders, trained)
        put(temporary / "export", out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(meta["images_seen"] for _, meta in trained.values())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="snapshot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="a folder that is not there yet")
    arguments = parser.parse_args(argv)
    with one_clear_line("snapshot") as outcome:
        images = snapshot(Path.cwd(), arguments.out.resolve())
        print(f"snapshot: {images:,} images seen; sampled by raphael generate --checkpoint {arguments.out}")
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
