"""The whole comparison at the smallest sizes: two systems, killed on the way, resumed, and not done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from truth.cascade_workspace import SMALL

from flows.environment import SWITCHES
from raphael.base.strict import flatten

PROJECT = Path(__file__).resolve().parents[3]
RECIPE = dict.fromkeys(("text_layers", "places", "terminal_snr", "noisiest_first"), "as it is")
LOOP = {"warmup_images": 16, "batch_size": 8, "log_every_images": 16, "checkpoint_every_images": 16,
        "sample_every_images": 0}  # fmt: skip
SHARED = {
    "source": {"max_heldout_prompts": 20, "scenes": {
        "num_rows": 120, "num_heldout_prompts": 4, "num_probe_scenes": 6, "min_side_px": 64, "max_side_px": 64,
        "bad_share": 0.02, "shares": {"single": 0.4, "relation": 0.3, "count": 0.2, "text": 0.1, "pair": 0.0,
                                      "three": 0.0}}},
    "download": {"image_size_px": 64, "shard_rows": 60, "threads": 8},
    "clip": {"context_length": 16, "loop": {"num_images": 192, "batch_size": 32, "warmup_images": 32,
                                            "log_every_images": 96, "checkpoint_every_images": 96}},
    "train": {"num_workers": 0, "loop": LOOP},
    "generate": {"steps": 2, "batch_size": 8},
    "evaluate": {"max_reference_images": 40, "num_probe": 3, "num_knockout_images": 0, "num_swaps": 0},
}  # fmt: skip


def small_plan() -> dict:
    debug = yaml.safe_load((PROJECT / "params.debug.yaml").read_text())
    own = {"autoencoder": debug["autoencoder"], "clip": {name: debug["clip"][name] for name in (
        "embed_dim", "text_width", "text_heads", "text_layers", "image_width")}}  # fmt: skip
    parts = {name: {"unet": {**part["unet"], "context_dim": 16, "context_length": 16}} for name, part in SMALL.items()}
    t5 = {"width": 16, "heads": 2, "hidden": 32, "layers": 1, "vocabulary": 128}
    cascade = {"clip": {"t5": t5}, "model": {"settings": parts}, "generate": {"upsampler_steps": 2}}

    def settings(changes: dict) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in flatten(changes).items()]

    latents = {"system": "raphael", "about": "latents", "recipe": RECIPE, "preset": "tiny-debug", "first": 0.5}
    dense = {**latents, "params": settings(own), "unet": ["time_layer=none", "space_layer=dense"]}
    pixels = {"system": "imagen", "about": "pixels", "recipe": RECIPE, "params": settings(cascade)}
    return {"about": "?", "flop": 6e9, "seeds": [0], "protocol": "systems/v1", "shared": SHARED, "num_shown": 3,
            "arms": {"dense": dense, "imagen": pixels}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_small_comparison_killed_and_resumed_ends_in_its_page_and_is_not_done_twice(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(small_plan(), sort_keys=False))
    for name in ("params.yaml", "prefect.toml"):
        (tmp_path / name).write_text((PROJECT / name).read_text())
    command = [sys.executable, "-m", "flows.run_systems", "--plan", "plan.yaml", "--jobs", "1"]
    env = {**os.environ, **SWITCHES, "PYTHONPATH": str(PROJECT), "PREFECT_HOME": str(tmp_path / ".run" / "prefect")}
    spaces, reports = tmp_path / "work/spaces/systems", tmp_path / "reports"
    broken = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (spaces / "dense-0/data/captions").is_dir() and broken.poll() is None:
        time.sleep(0.2)
    broken.send_signal(signal.SIGTERM)
    assert broken.wait(120) != 0 and not (reports / "systems.html").exists()
    first = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((reports / "systems.json").read_text())
    assert list(results["arms"]) == ["dense", "imagen"]
    asked = {"probe_shape", "probe_side", "probe_binding", "shape_accuracy", "both_pairs", "right_side"}
    assert asked <= results["metrics"].keys()
    assert any(name.startswith("fd_random") for name in results["metrics"])
    ones = [json.loads((reports / f"systems/{name}-0.json").read_text()) for name in results["arms"]]
    assert {one["protocol"] for one in ones} == {"systems/v1"} and len({one["prompts"] for one in ones}) == 1
    assert all(one["images"] == sum(one["parts"].values()) and one["seconds_an_image"] > 0 for one in ones)
    assert (reports / "systems.html").read_text().count("<img") == 6
    stamps = {file: file.stat().st_mtime for file in spaces.glob("*/models/raphael/manifest.json")}
    assert len(stamps) == 2
    second = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert second.returncode == 0 and {file: file.stat().st_mtime for file in stamps} == stamps
    assert json.loads((reports / "systems.json").read_text()) == results
