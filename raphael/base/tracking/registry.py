"""Trained models in MLflow: one logged model per checkpoint, which gathers what evaluations found (MLflow's Models page
is so a leaderboard), one version each in the registry, and the alias `best`, which moves only on evidence.

The weights stay where DVC has them: what is registered is a pointer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base.stage import write_json
from raphael.base.strict import flatten
from raphael.base.tracking.tracker import MlflowTracker, Tracker, tempfile_folder

if TYPE_CHECKING:
    from raphael.base.tracking.tracker import MlflowClient

BEST = "best"
TAG = "judged."  # of a version: what it was judged by


@dataclass(frozen=True)
class Judgement:
    """One number of a model with its 95 % interval, larger is better. protocol: a hash of how it was measured."""

    protocol: str
    metric: str
    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"{self.metric}: got {self.value} outside of its interval {self.low} to {self.high}")

    def tags(self) -> dict[str, str]:
        return {f"{TAG}{name}": str(value) for name, value in vars(self).items()}

    @classmethod
    def of_tags(cls, tags: dict[str, str]) -> Judgement | None:
        """None where a version was never judged."""
        found = {name.removeprefix(TAG): value for name, value in tags.items() if name.startswith(TAG)}
        if not found:
            return None
        return cls(found["protocol"], found["metric"], *(float(found[name]) for name in ("value", "low", "high")))


def protocol_sha256(**facts: Any) -> str:
    """A name for how something was measured: equal facts (JSON), equal name."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def is_better(new: Judgement, old: Judgement) -> bool:
    """Whether a gain is told from chance: the 95 % interval of the difference lies above zero.

    The interval is put together from the two given ones by the square-and-add rule (Newcombe 1998, Statistics in
    Medicine 17:873, method 10): its lower end is d - sqrt((new - low_new)^2 + (high_old - old)^2). It takes the two
    for independent, though both are of the same prompts: that errs towards leaving the alias where it is. Never for
    numbers of different protocols or metrics.
    """
    if (new.protocol, new.metric) != (old.protocol, old.metric):
        return False
    return difference_low(new, old) > 0


def difference_low(new: Judgement, old: Judgement) -> float:
    return new.value - old.value - ((new.value - new.low) ** 2 + (old.high - old.value) ** 2) ** 0.5


def register_model(tracker: Tracker, name: str, folder: Path, sha256: str, facts: dict[str, Any]) -> str | None:
    """Put a trained model into MLflow's registry: a new version of `name`, whose content is a pointer to `folder`.

    A version of the same content from the same run is not made twice. Returns the version, None where nothing was
    registered.
    """
    if not isinstance(tracker, MlflowTracker):
        return None

    def send(client: MlflowClient) -> str:
        for version in client.search_model_versions(f"name='{name}'"):
            if version.run_id == tracker.run_id and version.tags.get("sha256") == sha256:
                return str(version.version)
        model_id = _logged_model(client, tracker.run_id, name, folder, sha256, facts)
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name, description="RAPHAEL text-to-image models, one version per training")
        version = client.create_model_version(
            name, source=f"models:/{model_id}", run_id=tracker.run_id, model_id=model_id,
            tags={"sha256": sha256, "path": str(folder)},
            description=f"The weights are in {folder} (under DVC); pointer.json names their sha256.",
        )  # fmt: skip
        return str(version.version)

    return tracker.send(send)


def logged_model(tracker: Tracker, name: str, folder: Path, sha256: str, facts: dict[str, Any]) -> str | None:
    """The id of the checkpoint's logged model, made where there is none; None where nobody answers.

    Numbers logged with it (`tracker.log(..., model_id=)`) stand in MLflow's Models page beside those of other models.
    """
    if not isinstance(tracker, MlflowTracker):
        return None
    return tracker.send(lambda client: _logged_model(client, tracker.run_id, name, folder, sha256, facts))


def _logged_model(
    client: MlflowClient, run_id: str | None, name: str, folder: Path, sha256: str, facts: dict[str, Any]
) -> str:
    experiment_id = client.get_run(run_id).info.experiment_id
    for model in client.search_logged_models([experiment_id], f"name = '{name}' AND tags.sha256 = '{sha256}'"):
        if model.source_run_id == run_id:
            return model.model_id
    model = client.create_logged_model(
        experiment_id, name=name, source_run_id=run_id, model_type="text-to-image diffusion",
        tags={"sha256": sha256, "path": str(folder)}, params={key: str(value) for key, value in flatten(facts).items()},
    )  # fmt: skip
    with tempfile_folder() as home:
        write_json(home / "pointer.json", {"path": str(folder), "sha256": sha256, **facts})
        client.log_model_artifacts(model.model_id, str(home))
    client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


def promote(tracker: Tracker, name: str, sha256: str, judgement: Judgement) -> str | None:
    """Judge the registered version of that content; move the alias `best` to it where it deserves it.

    It does where no version has the alias, or where `is_better` than the one that has. Returns what was decided, in
    words; None where there is no such version or nobody answers.
    """
    if not isinstance(tracker, MlflowTracker):
        return None

    def send(client: MlflowClient) -> str | None:
        versions = [v for v in client.search_model_versions(f"name='{name}'") if v.tags.get("sha256") == sha256]
        if not versions:
            return None
        version = max(versions, key=lambda one: int(one.version))
        for tag, value in judgement.tags().items():
            client.set_model_version_tag(name, version.version, tag, value)
        holder = client.get_registered_model(name).aliases.get(BEST)
        if holder is not None and str(holder) != str(version.version):
            old = Judgement.of_tags(client.get_model_version(name, holder).tags)
            if reason := _stays(judgement, old):
                return f"{BEST} stays with version {holder}: {reason}"
        client.set_registered_model_alias(name, BEST, version.version)
        return f"{BEST} is version {version.version}: {judgement.metric} {judgement.value:.4g}"

    return tracker.send(send)


def _stays(new: Judgement, old: Judgement | None) -> str:
    """Why the alias does not move; "" where it does."""
    if old is None or is_better(new, old):
        return ""
    if (new.protocol, new.metric) != (old.protocol, old.metric):
        return "measured by another protocol"
    return f"{new.metric} {new.value:.4g} against {old.value:.4g} is within the intervals"
