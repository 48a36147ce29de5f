"""The tower t5 of the stage clip, and the fields text and text_mask that the stage encode computes with it once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from truth.cascade_workspace import settings
from truth.image_workspace import drawn, write_workspace

from data_pipeline.clip import stage as fit_clip
from data_pipeline.encode import stage as encode
from raphael.base.config.params import load_config
from raphael.base.records import TEXT, TEXT_MASK, Records
from raphael.base.stage import Stage
from raphael.encoders.text import load_text_encoder
from raphael.objectives.span_corruption import SpanCorruption

COUNT = 12
LOOP = {"num_images": 64, "batch_size": 16, "warmup_images": 16, "log_every_images": 16, "checkpoint_every_images": 16}


def workspace(root: Path, project: Path) -> Path:
    write_workspace(root, project, COUNT, shapes=((16, 16),))
    said = settings({"clip": {"loop": LOOP}, "encode": {"batch_size": 4}})
    (root / "params.yaml").write_text(yaml.safe_dump(said))
    return root


def run_clip(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    fit_clip.run(load_config("params.yaml"), Stage("clip", root))


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_the_tokens_of_records_are_the_encoders_own_and_their_mask_says_which_are_real(
    tmp_path: Path, project: Path, monkeypatch
) -> None:
    root = workspace(tmp_path, project)
    run_clip(root, monkeypatch)
    report = json.loads((root / "reports/clip.json").read_text())
    assert report["kind"] == "t5" and report["trained_on"] == COUNT and report["history"]
    encode.run(load_config("params.yaml"), Stage("encode", root))
    records, encoder = Records(root / "data/records"), load_text_encoder(root / "models/clip")
    assert records.fields[TEXT] == ("float16", (12, 16)) and records.fields[TEXT_MASK] == ("uint8", (12,))
    batch = records.batch(range(COUNT))
    encoding = encoder.encode(encoder.tokenize([drawn(number)[0] for number in range(COUNT)]))
    mask = encoding.mask.numpy()
    assert (batch[TEXT_MASK].astype(bool) == mask).all() and 3 < mask.sum(1).min() <= mask.sum(1).max() < 12
    np.testing.assert_allclose(batch[TEXT], encoding.context.numpy(), rtol=2e-3, atol=2e-3)
    assert records.facts["text_encoder"]["kind"] == "t5"


@pytest.mark.slow
def test_a_t5_killed_and_resumed_ends_in_the_bytes_of_an_undisturbed_run(tmp_path, project: Path, monkeypatch) -> None:
    whole, broken = workspace(tmp_path / "whole", project), workspace(tmp_path / "broken", project)
    run_clip(whole, monkeypatch)
    real, calls = SpanCorruption.forward, []

    def forward(self, batch, rng):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the machine is gone")
        return real(self, batch, rng)

    monkeypatch.setattr(SpanCorruption, "forward", forward)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        run_clip(broken, monkeypatch)
    run_clip(broken, monkeypatch)
    assert len(calls) == 5, "it resumed at the third step"
    assert digests(broken / "models/clip") == digests(whole / "models/clip")
    reports = [json.loads((root / "reports/clip.json").read_text()) for root in (whole, broken)]
    assert reports[0]["history"] == reports[1]["history"]
