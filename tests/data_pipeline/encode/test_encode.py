import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from truth.image_workspace import SMALL, drawn, small_preset, write_params, write_workspace

from data_pipeline.autoencoder import stage as fit_autoencoder
from data_pipeline.clip import stage as fit_clip
from data_pipeline.common.images import fit
from data_pipeline.encode import stage as encode
from raphael.base.config.data import PipelineConfig
from raphael.base.config.params import load_config
from raphael.base.records import EDGES, MOMENTS, TOKEN_IDS, Records
from raphael.base.stage import Stage, StageError, main
from raphael.encoders.autoencoder import load_autoencoder
from raphael.encoders.edges import detectors as edges
from raphael.encoders.edges.detectors import edge_map
from raphael.encoders.text import load_text_encoder
from raphael.objectives.autoencoding import to_network_range

COUNT = 10


def run(module, name, root, monkeypatch):
    monkeypatch.chdir(root)
    module.run(load_config(root / "params.yaml"), Stage(name, root))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, project):
    """A workspace whose autoencoder and CLIP were trained by the stages, for a moment."""
    root = write_workspace(tmp_path_factory.mktemp("workspace"), project, COUNT, **SMALL)
    write_params(root, project, **SMALL, model={"preset": small_preset(root, project)})
    with pytest.MonkeyPatch.context() as patch:
        run(fit_autoencoder, "autoencoder", root, patch)
        run(fit_clip, "clip", root, patch)
    return root


def report(root, stage):
    return json.loads((root / "reports" / f"{stage}.json").read_text())


def digest(root):
    return encode.records_digest(root / "data/records")


def test_the_encoders_are_trained_on_all_but_the_held_out_images_and_say_how_good_they_are(trained):
    told = report(trained, "autoencoder")
    assert (told["total"], told["kept"], told["trained_on"], told["heldout"]) == (COUNT, COUNT, COUNT - 2, 2)
    assert told["scaling_factor"] == load_autoencoder(trained / "models/autoencoder").scaling_factor
    assert told["psnr_db"] > 0 and told["history"][-1]["images"] == 16
    told = report(trained, "clip")
    assert told["heldout"] == 2 and set(told["retrieval"]) == {"image_to_text", "text_to_image", "chance", "pairs"}
    assert load_text_encoder(trained / "models/clip").dim == 32


def test_training_again_gives_the_same_weights(trained, monkeypatch):
    def weights(module, name, folder):
        run(module, name, trained, monkeypatch)
        return {path.name: path.read_bytes() for path in (trained / folder).iterdir()}

    import shutil

    for module, name in ((fit_autoencoder, "autoencoder"), (fit_clip, "clip")):
        folder = f"models/{name}"
        before = {path.name: path.read_bytes() for path in (trained / folder).iterdir()}
        shutil.rmtree(trained / "work" / name)
        assert weights(module, name, folder) == before


def test_records_hold_what_the_encoders_give_one_by_one(trained, monkeypatch):
    run(encode, "encode", trained, monkeypatch)
    records = Records(trained / "data/records")
    assert records.keys == [f"{number:09d}" for number in range(COUNT)]
    batch = records.batch(range(COUNT))
    autoencoder, text = load_autoencoder("models/autoencoder"), load_text_encoder("models/clip")
    captions, drawings = zip(*map(drawn, range(COUNT)), strict=True)
    images = np.stack([fit(image, 16, 32) for image in drawings])
    moments = autoencoder.encode_moments(to_network_range(torch.from_numpy(images)))
    assert batch[MOMENTS].dtype == np.float16 and batch[MOMENTS].shape == (COUNT, 8, 4, 8)
    np.testing.assert_allclose(batch[MOMENTS], moments.numpy(), atol=1e-3, rtol=2e-3)
    assert np.array_equal(batch[TOKEN_IDS], text.tokenize(list(captions)).numpy())
    assert np.array_equal(batch[EDGES], edge_map(images, (2, 4), "sobel", 0.3))
    told = json.loads((trained / "data/records/captions.json").read_text())
    assert told == dict(zip(records.keys, captions, strict=True))


def test_facts_say_how_the_records_came_about(trained, monkeypatch):
    run(encode, "encode", trained, monkeypatch)
    facts = Records(trained / "data/records").facts
    assert facts["picture"] == {"sizes_px": [[16, 32]]}
    assert facts["edge_detector"].startswith("sobel threshold=0.3")
    encoder = load_text_encoder(trained / "models/clip")
    assert facts["text_encoder"]["empty_token_ids"] == encoder.tokenize([""])[0].tolist()
    assert facts["autoencoder"] == load_autoencoder(trained / "models/autoencoder").facts()
    told = report(trained, "encode")
    assert (told["total"], told["kept"], told["dropped"], told["buckets"]) == (COUNT, COUNT, {}, {"16x32": COUNT})


def test_a_learned_edge_detector_is_named_with_its_weights_and_a_changed_file_is_noticed(
    trained, shared_data, project, monkeypatch
):
    from raphael.base.stage import file_sha256

    weights = trained / "detector.pth"
    learned = {"edge_detector": "pidinet", "edge_threshold": 0.0, "edge_weights": "detector.pth"}
    sections = {**SMALL, "encode": {**SMALL.get("encode", {}), **learned}}
    write_params(trained, project, **sections, model={"preset": small_preset(trained, project)})
    try:
        monkeypatch.chdir(trained)
        with pytest.raises(StageError, match="encode.edge_weights: got 'detector.pth', which is no file here"):
            run(encode, "encode", trained, monkeypatch)
        digests = []
        for size in ("-tiny", ""):
            weights.write_bytes((shared_data / f"weights/pidinet/table5_pidinet{size}.pth").read_bytes())
            edges._loaded.cache_clear()  # a stage is a process of its own
            run(encode, "encode", trained, monkeypatch)
            records = Records(trained / "data/records")
            assert (
                records.facts["edge_detector"] == f"pidinet threshold=0 max-pooled weights={file_sha256(weights)[:16]}"
            )
            images = np.stack([fit(drawn(number)[1], 16, 32) for number in range(COUNT)])
            told = records.batch(range(COUNT))[EDGES]
            assert np.array_equal(told, edge_map(images, (2, 4), "pidinet", 0.0, weights))
            digests.append(digest(trained))
        assert digests[0] != digests[1]
    finally:
        write_params(trained, project, **SMALL, model={"preset": small_preset(trained, project)})


def test_a_killed_run_resumes_and_ends_in_the_same_records(trained, monkeypatch):
    import shutil

    monkeypatch.setattr(encode, "CHUNK_BATCHES", 1)
    shutil.rmtree(trained / "work/encode", ignore_errors=True)
    run(encode, "encode", trained, monkeypatch)
    whole = digest(trained)
    shutil.rmtree(trained / "data/records")
    written = []
    replace = os.replace

    def killed_after_two(source, target):
        if str(target).endswith(".npz"):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(str(target))
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed_after_two)
        run(encode, "encode", trained, monkeypatch)
    assert not (trained / "data/records").exists()
    finished = list(written)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: written.append(str(target)) or replace(source, target))
        run(encode, "encode", trained, monkeypatch)
    assert digest(trained) == whole
    assert len(finished) == 2 and not set(finished) & set(written[2:]), "what was finished is not made again"
    assert not list((trained / "work/encode").glob("*/*.npz")), "a second copy of the records"


SHAPES = ((32, 40), (64, 30), (20, 20), (30, 66))  # 10 images in turn: 4:5, tall, square, wide
SIZES = [[32, 32], [48, 16], [16, 48], [80, 16]]  # the last gets none


@pytest.fixture
def mixed(trained, tmp_path, project, monkeypatch):
    """The same workspace with images of several shapes, and four buckets."""
    import shutil

    sections = {**SMALL, "picture": {"sizes_px": SIZES}, "encode": {"batch_size": 2}}
    root = write_workspace(tmp_path / "mixed", project, COUNT, shapes=SHAPES, **sections)
    write_params(root, project, **sections, model={"preset": small_preset(root, project)})
    shutil.copytree(trained / "models", root / "models")
    return root


def test_every_image_goes_to_the_bucket_nearest_in_shape_and_nowhere_else(mixed, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_BATCHES", 2)  # chunks of four: a bucket is spread over chunks
    run(encode, "encode", mixed, monkeypatch)
    records = Records(mixed / "data/records")
    expected = {"32x32": [0, 2, 4, 6, 8], "48x16": [1, 5, 9], "16x48": [3, 7], "80x16": []}
    assert records.keys == [f"{number:09d}" for numbers in expected.values() for number in numbers]
    assert {bucket.name: bucket.count for bucket in records.buckets} == {k: len(v) for k, v in expected.items()}
    assert report(mixed, "encode")["buckets"] == {"32x32": 5, "48x16": 3, "16x48": 2, "80x16": 0}
    autoencoder, text = load_autoencoder("models/autoencoder"), load_text_encoder("models/clip")
    start = 0
    for (height, width), numbers in zip(SIZES[:3], list(expected.values())[:3], strict=True):
        batch = records.batch(range(start, start + len(numbers)))
        start += len(numbers)
        shapes = [SHAPES[number % 4] for number in numbers]
        captions, drawings = zip(*(drawn(n, w, h) for n, (h, w) in zip(numbers, shapes, strict=True)), strict=True)
        images = np.stack([cover(image, height, width) for image in drawings])
        moments = autoencoder.encode_moments(to_network_range(torch.from_numpy(images))).numpy()
        assert batch[MOMENTS].shape == (len(numbers), 8, height // 4, width // 4)
        np.testing.assert_allclose(batch[MOMENTS], moments, atol=1e-3, rtol=2e-3)
        assert np.array_equal(batch[TOKEN_IDS], text.tokenize(list(captions)).numpy())
        assert batch[EDGES].shape == (len(numbers), height // 8, width // 8)
    assert json.loads((mixed / "data/records/captions.json").read_text()).keys() == set(records.keys)


def cover(image, height, width):
    """The largest middle part of the size's shape, then resized: nothing is padded, nothing is stretched."""
    box_height = min(image.height, image.width * height / width)
    box_width = box_height * width / height
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return np.asarray(image.resize((width, height), 3, box=(left, top, left + box_width, top + box_height)))


def test_with_buckets_too_a_run_in_other_chunks_ends_in_the_same_records(mixed, monkeypatch):
    import shutil

    def contents():
        records = Records(mixed / "data/records")
        return records.keys, records.facts, [records.batch(part) for part in (range(5), range(5, 8), range(8, 10))]

    run(encode, "encode", mixed, monkeypatch)
    keys, facts, batches = contents()  # read now: the next run puts other files into their place
    shutil.rmtree(mixed / "work/encode")
    monkeypatch.setattr(encode, "CHUNK_BATCHES", 1)
    run(encode, "encode", mixed, monkeypatch)
    again_keys, again_facts, again = contents()
    assert again_keys == keys and again_facts == facts
    for one, other in zip(batches, again, strict=True):
        for name in (TOKEN_IDS, EDGES):
            np.testing.assert_array_equal(one[name], other[name])
        np.testing.assert_allclose(one[MOMENTS], other[MOMENTS], atol=1e-3, rtol=2e-3)  # batches of another size


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_several_workers_end_in_the_same_records_and_the_same_report(mixed, monkeypatch, engine):
    import shutil

    monkeypatch.setattr(encode, "CHUNK_BATCHES", 1)
    run(encode, "encode", mixed, monkeypatch)
    alone, told = digest(mixed), report(mixed, "encode")
    shutil.rmtree(mixed / "data/records")
    config = load_config(mixed / "params.yaml")
    config = dataclasses.replace(config, pipeline=PipelineConfig(engine=engine, workers=2))
    stage = Stage("encode", mixed)
    encode.run(config, stage)
    assert digest(mixed) == alone
    assert report(mixed, "encode") == {**told, "engine": engine} and told["engine"] == "local"
    ran = stage.timings["engine"]
    assert ran["partitions"] == COUNT / 2 and 1 <= ran["workers"] <= 2 and ran["starting_s"] > 0


def test_sizes_that_the_autoencoder_and_the_network_cannot_halve_are_refused(mixed, project, monkeypatch):
    from dataclasses import replace

    from raphael.base.config.data import PictureConfig

    monkeypatch.chdir(mixed)
    config = replace(load_config("params.yaml"), picture=PictureConfig(((32, 32), (16, 24))))
    with pytest.raises(StageError, match=r"got \[16, 24\], expected multiples of 16 \(autoencoder 4 x U-Net 4\)"):
        encode.run(config, Stage("encode", mixed))


def test_encoders_that_do_not_fit_the_network_are_refused_before_anything_is_encoded(trained, project, monkeypatch):
    write_params(trained, project, **SMALL, model={"preset": small_preset(trained, project, context_dim=64)})
    try:
        with pytest.raises(StageError, match="text encoder gives context_dim 32, but the preset .* expects 64"):
            run(encode, "encode", trained, monkeypatch)
    finally:
        write_params(trained, project, **SMALL, model={"preset": small_preset(trained, project)})


def test_without_models_the_stage_to_run_is_named(tmp_path, project, monkeypatch, capsys):
    write_workspace(tmp_path, project, **SMALL)
    monkeypatch.chdir(tmp_path)
    assert main("encode", encode.run, "", ["--params", str(tmp_path / "params.yaml")]) == 1
    assert "run the stage autoencoder first" in capsys.readouterr().err


def test_pretrained_parts_are_checked_and_passed_on(trained, tmp_path, project, monkeypatch):
    sections = json.loads(json.dumps(SMALL))
    sections["autoencoder"]["pretrained"] = str(trained / "models/autoencoder")
    sections["clip"]["pretrained"] = str(trained / "models/clip")
    root = write_workspace(tmp_path / "other", project, **sections)
    run(fit_autoencoder, "autoencoder", root, monkeypatch)
    run(fit_clip, "clip", root, monkeypatch)
    for folder in ("models/autoencoder", "models/clip"):
        assert encode.records_digest(root / folder) == encode.records_digest(trained / folder)
    assert report(root, "clip")["trained_on"] == 0


def test_taef2_encodes_photographs_with_a_scaling_of_their_own(shared_data, tmp_path, project, monkeypatch):
    weights = str(shared_data / "weights/taesd_family")
    root = write_workspace(tmp_path, project, picture={"sizes_px": [[16, 32]]}, autoencoder={"pretrained": weights})
    run(fit_autoencoder, "autoencoder", root, monkeypatch)
    told = report(root, "autoencoder")
    assert told["kind"] == "taef2" and told["latent_channels"] == 32 and told["scaling_factor"] != 1.0
    assert load_autoencoder(root / "models/autoencoder").scaling_factor == told["scaling_factor"]
