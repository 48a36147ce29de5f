"""The field sizes: what an image was before it was scaled and cropped, and a network that is told it."""

import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from truth.image_workspace import SMALL, small_preset, write_params, write_workspace

from data_pipeline.autoencoder import stage as fit_autoencoder
from data_pipeline.clip import stage as fit_clip
from data_pipeline.encode import stage as encode
from raphael.base.config.params import load_config
from raphael.base.images.fit import fit, told_sizes
from raphael.base.randomness import SampleRng
from raphael.base.records import SIZES, Records
from raphael.base.stage import Stage, StageError, write_json
from raphael.base.strict import ConfigError

COUNT = 10
SHAPES = ((32, 40), (24, 64))  # of what is stored, in turn
FOUND = ((320, 400), (99, 264))  # of the same images before the download made them smaller


@pytest.mark.parametrize("stored", [(40, 64), (40, 97), (77, 32), (32, 32), (101, 33), (16, 20)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_what_is_told_of_the_crop_is_where_the_image_was_cut(stored, size):
    """Brightness of a picture is its place: the first row and column that are left say how much was cut off."""
    for axis in (0, 1):
        ramp = np.linspace(0, 255, stored[axis])
        picture = np.repeat(np.round(ramp)[:, None] if axis == 0 else np.round(ramp)[None], stored[1 - axis], 1 - axis)
        image = Image.fromarray(np.repeat(picture.astype(np.uint8)[..., None], 3, 2))
        left = fit(image, *size, area=True)[:, :, 0].mean(1 - axis)
        scale = max(size[0] / stored[0], size[1] / stored[1])
        middle = (size[axis] - 1) / 2  # the first pixel alone lies at the border, where resampling is one-sided
        at = np.interp(np.interp(middle, np.arange(size[axis]), left), ramp, np.arange(stored[axis]) + 0.5)
        cut = at * scale - (middle + 0.5)
        told = told_sizes((5, 6), stored, size)
        assert told[:2] == [5, 6] and told[4:] == list(size)
        assert abs(told[2 + axis] - cut) < 1.0, (axis, told, cut)


def test_a_small_image_on_white_is_told_as_cropped_where_a_side_is_too_long_alone():
    assert told_sizes((9, 100), (9, 100), (32, 32), pad=True) == [9, 100, 0, 34, 32, 32]
    assert told_sizes((9, 10), (9, 10), (32, 32), pad=True) == [9, 10, 0, 0, 32, 32]


@pytest.fixture
def workspace(tmp_path, project, monkeypatch):
    root = write_workspace(tmp_path, project, COUNT, shapes=SHAPES, **SMALL)
    preset = small_preset(root, project, vector_dim=6, size_px=4)
    fields = ["moments", "token_ids", "edges", "sizes"]
    write_params(root, project, **{**SMALL, "encode": {"batch_size": 4, "fields": fields}, "model": {"preset": preset}})
    monkeypatch.chdir(root)
    return root


def write_tables(root):
    """Beside the shards, as the stage download leaves them."""
    rows = pq.read_table(root / "data/captions/captions.parquet").to_pylist()
    for shard in {row["shard"] for row in rows}:
        table = [
            {"key": row["key"], "original_height": height, "original_width": width}
            for row in rows
            if row["shard"] == shard
            for height, width in [FOUND[int(row["key"]) % 2]]
        ]
        pq.write_table(pa.Table.from_pylist(table), (root / "data/shards" / shard).with_suffix(".parquet"))


def run(root, *stages):
    config = load_config(root / "params.yaml")
    for module, name in stages:
        module.run(config, Stage(name, root))
    return config


STAGES = (fit_autoencoder, "autoencoder"), (fit_clip, "clip"), (encode, "encode")


def test_records_hold_each_image_s_size_as_it_was_found_and_its_training_reads_them(workspace):
    from raphael.systems.raphael.training import Folders, build_denoising

    write_tables(workspace)
    config = run(workspace, *STAGES)
    records = Records(workspace / "data/records")
    told = records.batch(range(COUNT))[SIZES]
    # 32 x 40 -> scale 0.8, 25.6 x 32: 9.6 rows more than 16; 24 x 64 -> 2/3, 16 x 42.7: 10.7 columns more than 32
    expected = ([320, 400, 5, 0, 16, 32], [99, 264, 0, 5, 16, 32])
    assert told.dtype == np.int32 and told.tolist() == [expected[number % 2] for number in range(COUNT)]
    objective, _ = build_denoising(config, Folders.of(workspace, workspace / "work"))
    batch = {name: torch.from_numpy(array) for name, array in records.batch([0, 1]).items()}
    with torch.no_grad():
        for parameter in objective.unet.parameters():  # layers that begin at zero would hide what is before them
            parameter.normal_(std=0.1)
        objective.eval()
        rng, place = SampleRng(0, 0, [0, 1]), torch.tensor([0.5, 0.5])
        right = objective.heldout(batch, rng, place)
        wrong = objective.heldout({**batch, SIZES: batch[SIZES].flip(0)}, rng, place)
    assert right.isfinite().all() and not torch.equal(right, wrong)


def test_shards_that_do_not_say_their_images_sizes_are_one_line(workspace):
    with pytest.raises(StageError, match=r"00000.parquet: got no size of the image 000000000 .* run the stage"):
        run(workspace, *STAGES)


def test_sizes_and_the_network_that_reads_them_must_fit(workspace, project):
    wrong = small_preset(workspace, project, vector_dim=6, size_px=8)
    write_params(workspace, project, **SMALL, model={"preset": wrong})
    with pytest.raises(ConfigError, match=r"encode.fields: got .*expected sizes too"):
        load_config(workspace / "params.yaml")
    fields = ["moments", "token_ids", "edges", "sizes"]
    write_params(workspace, project, **{**SMALL, "encode": {"fields": fields}}, model={"preset": wrong})
    write_tables(workspace)
    with pytest.raises(StageError, match="the autoencoder gives size_px 4, but the preset .* expects 8"):
        run(workspace, *STAGES)


@pytest.mark.slow
def test_a_model_that_is_told_sizes_is_trained_by_the_stage_and_samples_at_any_size(workspace):
    from raphael.generate.pipeline import RaphaelPipeline

    settings = yaml.safe_load((workspace / "params.yaml").read_text())
    settings["train"] |= {"num_workers": 0, "sample_prompts": ["a red square on white"]}
    settings["train"]["loop"] |= {"num_images": 16, "batch_size": 4, "sample_every_images": 16}
    settings["train"]["settings"] |= {"num_probe": 0}
    settings["generate"] |= {"steps": 2}
    (workspace / "params.yaml").write_text(yaml.safe_dump(settings))
    write_tables(workspace)
    run(workspace, *STAGES)
    prompts = [{"prompt": "a red square on white", "suite": "captions", "truth": None, "reference": None}]
    write_json(workspace / "data/source/prompts.json", {"source": "scenes", "prompts": prompts})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "raphael.train"]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    pipeline = RaphaelPipeline.from_pretrained(workspace / "models/raphael")
    assert pipeline.unet.vector_in.weight.any()
    assert pipeline("a red square", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)
