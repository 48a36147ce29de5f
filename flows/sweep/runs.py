"""A sweep in MLflow: a parent run, a child a point, all under the same metric keys as an evaluation.

The parent is itself a child of the run that trained the model, where that is known. Which point has which run is noted
beside the results, so that a sweep taken up again makes none twice.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.sweep.plan import Model, SweepPlan, SweepPoint
from raphael.base.config.params import Config
from raphael.base.stage import read_json, write_json
from raphael.base.strict import to_dict
from raphael.base.tracking import tracker as tracking
from raphael.evaluate.findings import GRID
from raphael.pretrained.find import find_pipeline


class SweepRuns:
    """The parent's run and its children's. parent None: nobody answered, and nothing is tracked."""

    def __init__(self, config: Config, root: Path, file: Path, plan: SweepPlan, model: Model):
        self.config, self.root, self.file = config, root, file
        self.uri = tracking.resolve_uri(config, root)
        known = read_json(file) if file.exists() else {}
        same = known.get("plan") == plan.sha256 and known.get("model") == model.sha256
        if same and known["uri"] == tracking.public(self.uri) and tracking.reopen_run(self.uri, known["run_id"]):
            self.parent, self.children = known["run_id"], known["children"]
            return
        facts = {"sweep": {**to_dict(plan), "sha256": plan.sha256}, "model_sha256": model.checkpoint}
        self.parent = tracking.create_run(config, root, f"sweep-{plan.sha256[:8]}", facts)
        self.children: dict[str, str] = {}
        if self.parent is not None:
            tags = {"mlflow.note.content": plan.about}
            if (trained := trained_by(root, find_pipeline(plan.checkpoint, root), self.uri)) is not None:
                tags["mlflow.parentRunId"] = trained
            self._tag(self.parent, tags)
            self._write(plan.sha256, model.sha256)

    def log(self, point: SweepPoint, key: str, result: dict[str, Any], grid: Path) -> None:
        """The point's run under the parent, once: settings as params, numbers and grid under an evaluation's keys."""
        if self.parent is None or key in self.children:
            return
        from raphael.base.images.fit import read_image

        config = replace(self.config, generate=point.generate)
        run_id = tracking.create_run(config, self.root, point.name, point.knobs)
        if run_id is None:
            return
        tracker = tracking.MlflowTracker(self.uri, run_id, tracking.journal_of(self.root, run_id))
        with tracking.closing(tracker):
            tracker.tags({"mlflow.parentRunId": self.parent, "sweep.key": key, "model.sha256": point.model.checkpoint})
            tracker.dataset("reference", result["reference"], "data/captions", "evaluation")
            tracker.log({f"evaluate/{name}": value for name, value in result["metrics"].items()}, step=0)
            if grid.is_file():  # results of an earlier version have none
                image = read_image(grid, lambda image: image.convert("RGB"), "delete it and run the sweep again")
                tracker.image(GRID, image, step=0)
        self.children[key] = run_id
        known = read_json(self.file)
        write_json(self.file, {**known, "children": self.children})

    def finish(self, page: Path) -> None:
        """The page as the parent's artifact, and its end."""
        if self.parent is not None:
            tracker = tracking.MlflowTracker(self.uri, self.parent, tracking.journal_of(self.root, self.parent))
            tracker.artifact(page)
            tracker.close()

    def fail(self) -> None:
        if self.parent is not None:
            tracking.MlflowTracker(self.uri, self.parent, tracking.journal_of(self.root, self.parent)).close("FAILED")

    def _tag(self, run_id: str, tags: dict[str, str]) -> None:
        tracking.MlflowTracker(self.uri, run_id, tracking.journal_of(self.root, run_id)).tags(tags)

    def _write(self, plan: str, model: str) -> None:
        facts = {"plan": plan, "model": model, "uri": tracking.public(self.uri), "run_id": self.parent}
        write_json(self.file, {**facts, "children": self.children})


def trained_by(root: Path, checkpoint: Path, uri: str) -> str | None:
    """The run that trained the checkpoint, where this workspace noted it in the same store."""
    from raphael.base.integrity.contents import model_sha256

    file = root / tracking.RUNS_FILE
    known = (read_json(file) if file.exists() else {}).get(model_sha256(checkpoint))
    return known["run_id"] if known and known["uri"] == tracking.public(uri) else None
