"""A workspace as the stages before `generate` leave it, its model untrained and of the smallest size."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import yaml
from truth.tiny_raphael import ROOT, write_pipeline


def write_generating_workspace(root: Path, **evaluate: int) -> Path:
    """data/source, data/shards, data/captions and models/raphael. evaluate: changes of that section."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from data_pipeline.source.scene_captions import heldout_prompts
    from data_pipeline.source.scene_probe import probe_set

    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["generate"] |= {"steps": 2, "batch_size": 5, "images_per_prompt": 1}
    params["evaluate"] |= {"max_reference_images": 10, "num_probe": 2, "num_knockout_images": 4, "num_swaps": 2}
    params["evaluate"] |= evaluate
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    write_pipeline(root / "models/raphael")
    (root / "data/source").mkdir(parents=True)
    prompts = {"source": "scenes", "prompts": heldout_prompts(0, 3, 32, 0.12)}
    (root / "data/source/prompts.json").write_text(json.dumps(prompts))
    probe_set(0, 3, 32, 0.12, ()).write(root / "data/source/probe.npz")
    (root / "data/shards").mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(root / "data/shards/00000.tar", "w") as tar:
        for key in range(12):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{key:09d}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    (root / "data/captions").mkdir()
    kept = {"key": [f"{key:09d}" for key in range(11)], "shard": ["00000.tar"] * 11}
    pq.write_table(pa.table(kept), root / "data/captions/captions.parquet")
    (root / "reports").mkdir()
    told = {"total": 11, "kept": 11, "dropped": {}, "buckets": {"64x64": 9, "48x96": 2, "96x48": 0}}
    (root / "reports/encode.json").write_text(json.dumps(told))
    return root
