"""What a PNG says of itself: read by AUTOMATIC1111's rule, and made again to the byte."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from truth.tiny_raphael import write_pipeline

from raphael.base.config.sampling import Sampling
from raphael.base.stage import StageError
from raphael.cli.main import main
from raphael.generate.metadata import FORM, JSON, SAMPLERS, TEXT, Made, a1111, batch_of, chunk, read_made

# AUTOMATIC1111's modules/infotext_utils.py reads the last line by this
PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


def generate(folder, out, *arguments):
    return main(["generate", *arguments, "--checkpoint", str(folder), "--out", str(out)])


def as_a1111_reads(text):
    """parse_generation_parameters: the last line has the settings, what stands before is prompt and negative prompt."""
    *lines, last = text.strip().split("\n")
    found, prompt, negative, done = dict(PARAM.findall(last)), [], [], False
    for line in lines:
        if line.startswith("Negative prompt:"):
            done, line = True, line.removeprefix("Negative prompt:").strip()
        (negative if done else prompt).append(line)
    return "\n".join(prompt), "\n".join(negative), found


@pytest.mark.parametrize("batch_size", ["50", "2"])
def test_a_picture_is_made_again_to_the_byte_from_what_it_says(folder, tmp_path, batch_size):
    prompts = ["a (red:1.3) circle", 'größer ★ "quoted", comma: 5']
    more = [
        "--num-images",
        "2",
        "--seed",
        "7",
        "--negative-prompt",
        "blue",
        "--size",
        "24x40",
        "--batch-size",
        batch_size,
    ]
    how = ["--steps", "3", "--sampler", "ddim", "--eta", "0.5", "--guidance-rescale", "0.4"]
    assert generate(folder, tmp_path / "a", *prompts, *more, *how) == 0
    for number in range(4):
        file = tmp_path / "a" / f"{number:05d}.png"
        assert generate(folder, tmp_path / f"b{number}", "--from", str(file)) == 0
        assert (tmp_path / f"b{number}" / file.name).read_bytes() == file.read_bytes()


def test_automatic1111_reads_prompt_and_settings(folder, tmp_path):
    assert generate(folder, tmp_path, "a ★ ring", "--seed", "3", "--steps", "2", "--negative-prompt", "blue, red") == 0
    prompt, negative, found = as_a1111_reads(Image.open(tmp_path / "00000.png").text[TEXT])
    assert (prompt, negative) == ("a ★ ring", "blue, red")
    assert (
        found["Steps"] == "2" and found["Sampler"] == "DPM++ 2M" and found["Seed"] == "3" and found["Size"] == "32x32"
    )
    assert float(found["CFG scale"]) == 4.0
    made = Made("0123456789abcdef", 3, 4, 1, ("a", "b"), "", Sampling("euler_ancestral"), (24, 40))
    prompt, negative, found = as_a1111_reads(a1111(made))
    assert (prompt, negative, found["Size"], found["Sampler"]) == ("b", "", "40x24", "Euler a")
    assert found["Model hash"] == "0123456789" and found["Image number"] == "5"


def test_every_sampler_has_a_name_there():
    from typing import get_args

    from raphael.base.config.sampling import SamplerName

    assert set(SAMPLERS) == set(get_args(SamplerName))


def test_the_same_request_gives_the_same_bytes_and_without_metadata_the_pixels_alone(folder, tmp_path):
    for name, more in (("a", []), ("b", []), ("bare", ["--no-metadata"])):
        assert generate(folder, tmp_path / name, "a ring", "--steps", "2", *more) == 0
    one, again, bare = (tmp_path / name / "00000.png" for name in ("a", "b", "bare"))
    assert one.read_bytes() == again.read_bytes() != bare.read_bytes()
    assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(bare)))
    assert Image.open(bare).info == {}
    whole = one.read_bytes()
    assert b"tIME" not in whole and b"date" not in whole.lower()


def test_pictures_of_a_file_of_prompts_say_it_too_and_are_made_again_with_brackets_as_letters(folder, tmp_path):
    listed = [{"prompt": "a (red) ring"}, {"prompt": "a star", "seed": 9}, {"prompt": "größer ★"}]
    (tmp_path / "list.json").write_text(json.dumps({"prompts": listed}))
    options = ["--prompts", str(tmp_path / "list.json"), "--steps", "2", "--seed", "4", "--batch-size", "4"]
    assert generate(folder, tmp_path / "a", *options, "--num-images", "2") == 0
    for number in range(6):
        file = tmp_path / "a" / f"{number:05d}.png"
        assert generate(folder, tmp_path / f"b{number}", "--from", str(file)) == 0
        assert (tmp_path / f"b{number}" / file.name).read_bytes() == file.read_bytes()
    own = as_a1111_reads(Image.open(tmp_path / "a/00002.png").text[TEXT])
    assert own[0] == "a star" and own[2]["Seed"] == "9" and "Image number" not in own[2]
    assert generate(folder, tmp_path / "bare", *options, "--num-images", "2", "--no-metadata") == 0
    assert Image.open(tmp_path / "bare/00000.png").info == {}


def test_image_to_image_is_made_again_with_the_picture_that_it_began_from(folder, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "begin.png")
    Image.fromarray(pixels[::-1]).save(tmp_path / "other.png")
    begin = ["--image", str(tmp_path / "begin.png")]
    more = ["--strength", "0.5", "--steps", "4", "--num-images", "2", "--best-of", "2"]
    assert generate(folder, tmp_path / "a", "a ring", *begin, *more) == 0
    file = tmp_path / "a/00001.png"
    assert as_a1111_reads(Image.open(file).text[TEXT])[2]["Denoising strength"] == "0.5"
    assert json.loads((tmp_path / "a/images.json").read_text())["settings"]["strength"] == 0.5
    assert generate(folder, tmp_path / "b", "--from", str(file), *begin) == 0
    again = next((tmp_path / "b").glob("*.png"))
    assert again.read_bytes() == file.read_bytes()
    capsys.readouterr()
    for wrong, said in (
        ([], "got no --image, expected the picture that it began from"),
        (["--image", str(tmp_path / "other.png")], "expected the picture that it began from"),
        ([*begin, "--strength", "0.7"], "--strength: got 0.7, expected the picture's own"),
    ):
        assert generate(folder, tmp_path / "c", "--from", str(file), *wrong) == 1
        assert said in capsys.readouterr().err
    assert generate(folder, tmp_path / "c", "a ring", "--strength", "0.7") == 1
    assert "--strength: got 0.7, expected --image, a picture to begin from" in capsys.readouterr().err
    assert generate(folder, tmp_path / "plain", "a ring", "--steps", "1") == 0
    assert generate(folder, tmp_path / "c", "--from", str(tmp_path / "plain/00000.png"), *begin) == 1
    assert "--image: got it with --from of a picture that began from none" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_the_prompts_of_a_large_batch_are_compressed_and_read_back(tmp_path):
    made = Made("0123456789abcdef", 3, 0, 7, tuple(f"a red circle {i} ★" for i in range(100)), "", Sampling(), (8, 8))
    Image.new("RGB", (8, 8)).save(tmp_path / "many.png", pnginfo=chunk(made))
    assert read_made(tmp_path / "many.png") == made
    assert (tmp_path / "many.png").stat().st_size < 1500


def test_the_batch_of_an_image_is_the_one_that_it_was_sampled_in():
    prompts = [f"p{i}" for i in range(7)]
    assert batch_of(prompts, 5, 3) == (3, ("p3", "p4", "p5")) and batch_of(prompts, 6, 3) == (6, ("p6",))


def test_a_file_that_does_not_say_or_says_nonsense_is_one_line(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "bare", "a ring", "--steps", "1", "--no-metadata") == 0
    with pytest.raises(StageError, match="does not say how it was made"):
        read_made(tmp_path / "bare/00000.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(StageError, match="not a whole image"):
        read_made(tmp_path / "text.png")
    good = {
        "form": FORM, "model": "m", "seed": 0, "first": 0, "row": 0, "batch": ["a"], "negative_prompt": "",
        "sampling": {}, "size_px": [8, 8],
    }  # fmt: skip
    wrong = [
        {"form": "other/1"},
        {"row": 1},
        {"size_px": [8]},
        {"seed": "x"},
        {"seeds": [[1]]},
        {"seeds": [[1, 0], [1, 0]]},
        {"sampling": {"sampler": "none"}},
        {"more": 1},
    ]
    for change in [{}, *wrong]:
        info = PngImagePlugin.PngInfo()
        info.add_text(JSON, json.dumps({**good, **change}))
        Image.new("RGB", (8, 8)).save(tmp_path / "said.png", pnginfo=info)
        if not change:
            assert read_made(tmp_path / "said.png").prompt == "a"
            continue
        with pytest.raises(StageError, match="what it says of itself is damaged") as error:
            read_made(tmp_path / "said.png")
        assert "\n" not in str(error.value)


def test_a_picture_of_another_model_or_with_other_settings_is_refused(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "a", "a ring", "--steps", "1") == 0
    file = str(tmp_path / "a/00000.png")
    assert generate("scenes", tmp_path / "b", "--from", file) == 1
    assert "the picture was made by model" in capsys.readouterr().err
    assert generate(folder, tmp_path / "b", "--from", file, "--steps", "5") == 1
    assert "got --steps with it, expected the picture's own settings alone" in capsys.readouterr().err
    assert generate(folder, tmp_path / "b", "a ring", "--from", file) == 1
    assert "got both, expected prompts" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    shutil.rmtree(tmp_path / "a")
