"""Folders of images measured by a protocol, through the command line, with small networks of random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from raphael.base.config.params import load_config
from raphael.base.stage import StageError, read_json
from raphael.cli.main import main
from raphael.evaluate.features.cache import embed_folder
from raphael.evaluate.features.extract import FeatureSpace, inception_space, network_sha256
from raphael.evaluate.features.image_folder import ImageFolder, Preparation, read_prepared
from raphael.evaluate.metrics.frechet import Features


def draw(folder, count, seed=0, size=(40, 40), ending=".png"):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        colours = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:03d}{ending}")
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, project):
    from dataclasses import replace

    from raphael.encoders.clip import build_clip, save_clip

    config = load_config(project / "params.yaml").clip
    small = {"embed_dim": 16, "image_tower": "vit", "image_size_px": 32, "patch_size_px": 16}
    small |= {"image_width": 32, "image_layers": 1}
    small |= {"text_width": 32, "text_heads": 2, "text_layers": 1, "context_length": 16}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(build_clip(replace(config, **small)), folder)
    return folder


def evaluate(tmp_path, clip_folder, *more):
    arguments = ["evaluate", "--images", str(tmp_path / "a"), "--reference", str(tmp_path / "b")]
    options = ["--features", str(clip_folder), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out.json")]
    return main([*arguments, *options, *more])


def test_two_folders_become_a_table_and_numbers_that_say_where_they_come_from(tmp_path, clip_folder, capsys):
    draw(tmp_path / "a", 9), draw(tmp_path / "b", 11, seed=1, size=(60, 44), ending=".jpg")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a thing of kind {index}" for index in range(9)))
    more = ["--prompts", str(tmp_path / "prompts.txt"), "--guidance-scale", "4", "--sampler", "ddim", "--steps", "9"]
    assert evaluate(tmp_path, clip_folder, *more) == 0
    report = read_json(tmp_path / "out.json")
    numbers = {number["name"]: number for number in report["numbers"]}
    sha256 = next(iter(report["networks"].values()))
    name = sha256[:8]
    assert set(numbers) == {f"fd_clip_{name}_9", f"clip_score_{name}", f"clip_score_{name}_of_other_prompts"} | {
        f"{metric}_clip_{name}" for metric in ("kid", "cmmd", "precision", "recall", "density", "coverage")
    }
    for number in numbers.values():
        assert number["protocol"] == "pair-debug/v1" and (number["n"], number["n_reference"]) == (9, 11)
        assert (number["guidance_scale"], number["sampler"], number["steps"]) == (4.0, "ddim", 9)
        assert number["network"] == sha256 and "weights" in number
    score = numbers[f"clip_score_{name}"]
    assert score["low"] < score["value"] < score["high"]
    printed = capsys.readouterr().out
    assert "pair-debug/v1: 9 images against 11" in printed and f"fd_clip_{name}_9" in printed


def test_metrics_asked_for_beside_a_protocol_say_so_in_their_numbers(tmp_path, clip_folder):
    draw(tmp_path / "a", 9), draw(tmp_path / "b", 11, seed=1)
    (tmp_path / "prompts.txt").write_text("\n".join(f"a thing of kind {index}" for index in range(9)))
    torch.manual_seed(2)
    weight = torch.randn(1, 16)
    torch.save({"weight": weight, "bias": torch.zeros(1)}, tmp_path / "head.pth")
    asked = ["--prompts", str(tmp_path / "prompts.txt"), "--metric", "retrieval", "--metric", "aesthetic"]
    assert evaluate(tmp_path, clip_folder, *asked) == 0
    absent = read_json(tmp_path / "out.json")["absent"]
    assert set(absent) == {"aesthetic"} and "give --aesthetic-head FILE" in absent["aesthetic"]
    assert evaluate(tmp_path, clip_folder, *asked, "--aesthetic-head", str(tmp_path / "head.pth")) == 0
    numbers = {number["name"]: number for number in read_json(tmp_path / "out.json")["numbers"]}
    (name,) = (name for name in numbers if name.startswith("retrieval_of_9_"))
    assert numbers[name]["protocol"] == "pair-debug/v1 + retrieval"
    (score,) = (number for key, number in numbers.items() if key.startswith("aesthetic_v1_"))
    assert score["protocol"] == "pair-debug/v1 + aesthetic" and score["low"] < score["value"] < score["high"]
    assert {n["protocol"] for key, n in numbers.items() if key not in (name, score["name"])} == {"pair-debug/v1"}
    rows = np.concatenate([np.load(file) for file in sorted((tmp_path / "cache").rglob("*.npy"))])
    means = [rows[:9] @ weight[0].numpy(), rows[-9:] @ weight[0].numpy()]  # either folder's block comes first
    assert any(score["value"] == pytest.approx(float(part.mean()), abs=1e-5) for part in means)


def test_a_network_without_weights_measures_where_no_other_is(tmp_path, capsys):
    draw(tmp_path / "a", 9), draw(tmp_path / "b", 11, seed=1)
    arguments = ["--images", str(tmp_path / "a"), "--reference", str(tmp_path / "b"), "--features", "random"]
    assert main(["evaluate", *arguments, "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o.json")]) == 0
    report = read_json(tmp_path / "o.json")
    assert {number["name"] for number in report["numbers"]} >= {"fd_random64_9", "recall_random64", "kid_random64"}
    assert "no CLIP among the networks" in report["absent"]["cmmd"]
    assert "kid_random64" in capsys.readouterr().out


def test_the_numbers_are_those_of_a_loop_over_images_with_open_clip_itself(tmp_path, clip_folder):
    """One image at a time, open_clip's own transform and towers; then the textbook formulas."""
    from open_clip.transform import image_transform

    from raphael.encoders.clip import load_clip_folder

    draw(tmp_path / "a", 6, size=(300, 256)), draw(tmp_path / "b", 7, seed=1)
    prompts = [f"a {colour} field" for colour in ("red", "blue", "green", "grey", "pink", "dark")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    assert evaluate(tmp_path, clip_folder, "--prompts", str(tmp_path / "prompts.txt")) == 0
    clip = load_clip_folder(clip_folder)
    transform = image_transform(32, is_train=False, mean=clip.mean, std=clip.std)
    cosines, sides = [], {"a": [], "b": []}
    for side, rows in sides.items():
        for path in sorted((tmp_path / side).glob("*.png")):
            prepared = Image.fromarray(read_prepared(path, Preparation("centre", 256)))
            with torch.no_grad():
                row = clip.model.encode_image(transform(prepared)[None])[0].double()
            rows.append((row / row.norm()).numpy())
    for row, prompt in zip(sides["a"], prompts):
        with torch.no_grad():
            text = clip.model.encode_text(clip.tokenize([prompt]))[0].double()
        cosines.append(float(row @ (text / text.norm()).numpy()))
    report = read_json(tmp_path / "out.json")
    numbers = {number["name"]: number["value"] for number in report["numbers"]}
    name = next(iter(report["networks"].values()))[:8]
    assert numbers[f"clip_score_{name}"] == pytest.approx(np.mean(cosines), abs=1e-6)
    ours, real = np.array(sides["a"]), np.array(sides["b"])
    assert numbers[f"fd_clip_{name}_6"] == pytest.approx(
        Features(16).update(ours).distance(Features(16).update(real)), abs=1e-6
    )

    def gauss(x, y):
        return np.mean([[np.exp(-((p - q) @ (p - q)) / 200) for q in y] for p in x])

    mmd = gauss(ours, ours) + gauss(real, real) - 2 * gauss(ours, real)
    assert numbers[f"cmmd_clip_{name}"] == pytest.approx(1000 * mmd, abs=1e-4)  # the towers' float32, times 1000


def test_clip_scales_and_crops_a_photograph_as_open_clip_does(clip_folder):
    from open_clip.transform import image_transform

    from raphael.encoders.clip import load_clip_folder
    from raphael.encoders.image import load_clip

    clip, scorer = load_clip_folder(clip_folder), load_clip(clip_folder)
    rng = np.random.default_rng(3)
    for size in ((640, 427), (333, 500), (101, 57), (32, 33), (41, 40)):
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        theirs = image_transform(32, is_train=False, mean=clip.mean, std=clip.std)(image)
        ours = scorer.normalise(torch.tensor(scorer._fit(image))[None])[0]
        assert torch.allclose(ours, theirs, atol=1e-5), size


def test_the_second_run_reads_no_image_and_gives_the_same(tmp_path, clip_folder, monkeypatch):
    import raphael.evaluate.features.image_folder as module

    draw(tmp_path / "a", 5), draw(tmp_path / "b", 5, seed=1)
    assert evaluate(tmp_path, clip_folder) == 0
    first = (tmp_path / "out.json").read_bytes()
    monkeypatch.setattr(module, "read_prepared", lambda *_: pytest.fail("an image was read again"))
    assert evaluate(tmp_path, clip_folder) == 0
    assert (tmp_path / "out.json").read_bytes() == first


def mean_colours(name="fd_mean", scale=1.0):
    return FeatureSpace(name, lambda batch: batch.reshape(len(batch), -1, 3).mean(1) * scale, name.ljust(16, "0"))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_pass_serves_all_networks_and_workers_make_the_same_blocks(tmp_path, monkeypatch, workers):
    import raphael.evaluate.features.cache as module

    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    folder = ImageFolder.read(draw(tmp_path / "a", 11))
    read = []
    monkeypatch.setattr(
        "raphael.evaluate.features.image_folder.read_prepared",
        lambda path, *rest: read.append(path.name) or read_prepared(path, *rest),
    )
    networks, prepare = [mean_colours(), mean_colours("fd_half", 0.5)], (Preparation("centre", 8), 0)
    for which in range(workers):
        sets = embed_folder(folder, prepare, networks, tmp_path / "cache", (which, workers))
    assert sorted(read) == [path.name for path in folder.files]
    truth = np.stack([read_prepared(path, prepare[0]).reshape(-1, 3).mean(0) for path in folder.files])
    assert np.allclose(sets[0].array(), truth) and np.allclose(sets[1].array(), truth / 2)
    assert sets[0].array().dtype == np.float32 and sets[0].num_blocks == 3
    sets[0].path(1).unlink()
    read.clear()
    embed_folder(folder, prepare, networks, tmp_path / "cache")
    assert read == [path.name for path in folder.files[4:8]], "only the missing block is computed again"


def test_features_that_are_not_numbers_are_an_error_and_leave_no_block(tmp_path):
    folder = ImageFolder.read(draw(tmp_path / "a", 3))
    with pytest.raises(ValueError, match="NaN"):
        embed_folder(folder, (Preparation("none", 0), 0), [mean_colours(scale=np.nan)], tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_an_image_is_cropped_to_the_middle_square_then_scaled_by_lanczos(tmp_path):
    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (30, 51, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png")
    expected = image.crop((10, 0, 40, 30)).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(read_prepared(tmp_path / "x.png", Preparation("centre", 16)), np.asarray(expected))


def truncated(folder):
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "more", "says"),
    [
        (lambda a, b: truncated(a), (), "001.png: not a whole image"),
        (lambda a, b: draw(a, 1), (), ""),  # nothing spoilt
        (lambda a, b: [path.unlink() for path in sorted(b.iterdir())[1:]], (), "got 1 references, expected at least 2"),
        (lambda a, b: None, ("--protocol", "fid-5k/v1"), "got 4 images, expected at least 5,000"),
        (lambda a, b: None, ("--protocol", "nope/v1"), "expected one of coco2014-30k/community"),
        (lambda a, b: None, ("--protocol", "pair-debugg/v1"), "'pair-debugg/v1', did you mean pair-debug/v1"),
        (lambda a, b: None, ("--metric", "retrieva"), "--metric: got 'retrieva', did you mean retrieval"),
        (lambda a, b: None, ("--protocol", "drawbench/v1"), "this protocol has none"),
        (
            lambda a, b: None,
            ("--features", "inception:/nowhere.pth"),
            "/nowhere.pth: no such file.*fetch https://github.* and put it there$",
        ),
        (
            lambda a, b: [path.rename(path.with_suffix(".jpg")) for path in a.iterdir()],
            ("--protocol", "fid-5k/v1"),
            r"got no images, expected files that end in .png \(there are .jpg: write them as one of these\)",
        ),
        (lambda a, b: None, ("--features", "taesd:/nowhere"), "taef2_encoder.pth"),
        (lambda a, b: None, ("--features", "/nowhere"), "--features: CLIP: got '/nowhere'"),
        (lambda a, b: [path.unlink() for path in a.iterdir()], (), "got no images"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(tmp_path, clip_folder, capsys, spoil, more, says):
    import re

    a, b = draw(tmp_path / "a", 4), draw(tmp_path / "b", 4, seed=1)
    spoil(a, b)
    status = evaluate(tmp_path, clip_folder, *more)
    captured = capsys.readouterr()
    assert status == (1 if says else 0)
    errors = [line for line in captured.err.splitlines() if "error:" in line]
    assert len(errors) == bool(says) and (not says or re.search(says, errors[0])), captured.err
    assert (tmp_path / "out.json").exists() == (not says)


def test_too_few_images_of_a_prompt_list_say_how_to_generate_it():
    from raphael.evaluate.protocols.protocol import load_protocol

    with pytest.raises(StageError, match="got 4 images, expected at least 200; generate all of .*raphael generate"):
        load_protocol("drawbench/v1").check_counts(4, 0)
    with pytest.raises(StageError, match="distances of few images.*pair-debug/v1"):
        load_protocol("fid-5k/v1").check_counts(4, 40_504)


def test_the_printed_table_stands_in_columns_with_interval_and_chance():
    from raphael.evaluate.protocols.measure import table

    long = {"name": "background_colour_accuracy", "value": 0.995, "low": 0.9722, "high": 0.9991, "chance": 0.1}
    numbers = [long | {"network": "scene_reader"}, {"name": "kid", "value": -1e-5, "network": "0123456789abcdef"}]
    report = {"protocol": "p/v1", "images": {"n": 1200}, "reference": None, "settings": {"steps": None}}
    lines = table(report | {"numbers": numbers, "absent": {"cmmd": "no CLIP"}}).splitlines()
    assert lines[0] == "p/v1: 1,200 images; steps ?" and lines[3] == "  cmmd: not measured: no CLIP"
    assert lines[1] == "  background_colour_accuracy   0.995  [0.9722, 0.9991]  chance 0.1  scene_reader"
    assert lines[2] == "  kid                         -1e-05                                0123456789ab"


def test_a_protocol_of_one_size_refuses_an_image_of_another(tmp_path):
    folder = ImageFolder.read(draw(tmp_path / "a", 2, size=(40, 32)))
    with pytest.raises(StageError, match="000.png: got 40 x 32 px, the protocol takes only 256 x 256"):
        list(folder.prepared(Preparation("centre", 256), only_size_px=256))


def test_missing_inception_weights_say_which_file_from_where_and_where_to_put_it(tmp_path, monkeypatch):
    from raphael.evaluate.protocols.folders import feature_specs
    from raphael.evaluate.protocols.protocol import load_protocol

    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StageError, match=r"weights-inception.*pth: .*fetch https://.*put it at models/inception/weights"
    ):
        feature_specs(load_protocol("coco2014-val-30k/v1"), [])
    with pytest.raises(StageError, match="needs a CLIP.*put one at models/clip"):
        feature_specs(load_protocol("drawbench/v1"), [])


def test_random_inception_weights_give_features_but_never_the_name_fid(tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "empty.pth")
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth"))
    torch.save(network.state_dict(), tmp_path / "random.pth")
    space = inception_space(str(tmp_path / "random.pth"))
    assert space.name == f"fd_inception_{space.network[:8]}"
    pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        truth = torch.cat([network(torch.from_numpy(item).permute(2, 0, 1)[None])[0] for item in pictures])
    assert space.embed(pictures).shape == (2, 2048)
    np.testing.assert_allclose(space.embed(pictures), truth.numpy(), rtol=1e-4, atol=1e-5)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(StageError, match="not torch-fidelity's weights"):
        inception_space(str(tmp_path / "other.pth"))


class Evil:
    def __reduce__(self):
        return (open, ("/nonexistent/evil", "w"))


def test_a_weights_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(StageError, match="not torch-fidelity's weights"):
        inception_space(str(tmp_path / "evil.pth"))


def test_the_hash_of_a_network_changes_with_any_weight_and_with_nothing_else():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = network_sha256(network)
    assert network_sha256(network.eval()) == before
    network[1].running_mean[2] += 1e-3
    assert network_sha256(network) != before


def test_photographs_and_a_real_autoencoder_give_numbers(tmp_path, shared_data):
    for side, source in (("a", "train2017"), ("b", "val2017")):
        (tmp_path / side).mkdir()
        for path in sorted((shared_data / "coco" / source).glob("*.jpg"))[:3]:
            (tmp_path / side / path.name).symlink_to(path)
    weights = shared_data / "weights" / "taesd_family"
    arguments = ["evaluate", "--images", str(tmp_path / "a"), "--reference", str(tmp_path / "b")]
    arguments += ["--features", f"taesd:{weights}", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "o.json")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "o.json").read_text())
    values = {number["name"]: number["value"] for number in report["numbers"]}
    assert 0 < values["fd_taesd_3"] < 100 and "precision_recall" in report["absent"]
