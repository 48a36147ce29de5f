"""The numbers of `raphael evaluate --images` in MLflow: a run of its own, and that which trained the model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from raphael.base.config.params import load_config
from raphael.base.stage import read_json, write_json
from raphael.base.tracking.tracker import RUNS_FILE, public, resolve_uri, tracker_of_evaluation, tracker_of_model

MODEL = Path("models/raphael")


def log_report(report: dict[str, Any], listing: dict[str, Any], params: Path) -> str:
    """Log each number as evaluate/<protocol>/<name> and the whole report as an artifact; -> a line that says where.

    Only for images whose model is known (images.json tells its hash) and a workspace that already tracks something:
    measuring two folders somewhere must not make a database there. The step is the images the model has seen where
    the workspace holds that model, else 0.
    """
    identity = str(report["settings"]["weights"] or listing.get("model") or "")
    if not identity:
        return "not tracked: the images do not say which model generated them"
    if not params.is_file():
        return f"not tracked: no {params} here, so no workspace"
    config, root = load_config(params), params.resolve().parent
    uri = resolve_uri(config, root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return f"not tracked: {public(uri)} does not exist; a training makes it"
    known = read_json(root / RUNS_FILE) if (root / RUNS_FILE).is_file() else {}
    whole = next((sha256 for sha256 in known if sha256.startswith(identity)), identity)
    trained = tracker_of_model(config, root, whole)
    own = tracker_of_evaluation(config, root, whole, trained.run_id)
    metrics = {}
    for number in report["numbers"]:
        name = f"evaluate/{report['protocol']}/{number['name']}"
        metrics[name] = float(number["value"])
        metrics |= {f"{name}_{end}": float(number[end]) for end in ("low", "high") if end in number}
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / f"{report['protocol'].replace('/', '-')}-{report['images']['sha256'][:8]}.json"
        write_json(file, report)
        for tracker in (own, trained):
            tracker.log(metrics, step=_images_seen(root, identity), again=True)
            tracker.artifact(file, "evaluate")
            tracker.close()
    return f"tracked in {public(uri)}, run {own.run_id} and, beside its training, {trained.run_id}"


def _images_seen(root: Path, identity: str) -> int:
    from raphael.base.integrity.contents import model_sha256
    from raphael.base.manifest import ManifestError

    try:
        if model_sha256(root / MODEL).startswith(identity):
            return int(read_json(root / MODEL / "meta.json").get("images_seen", 0))
    except (ManifestError, OSError):
        pass  # another model, or none: the number stands without a place on the training's axis
    return 0
