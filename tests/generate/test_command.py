"""`raphael generate` and what looks into a checkpoint, as commands."""

import json
import subprocess
import sys

import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.generate.pipeline import RaphaelPipeline

ROUNDING = 2e-3  # of latents of order 1: kernels differ between batch sizes in the last bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def pipeline(folder):
    return RaphaelPipeline.from_pretrained(folder)


def test_the_command_generates_prints_and_repeats_itself(folder, tmp_path):
    from raphael.cli.main import main

    arguments = [
        "generate",
        "a red circle",
        "a star",
        "--seed",
        "7",
        "--steps",
        "2",
        "--num-images",
        "2",
        "--checkpoint",
        str(folder),
    ]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b"), "--num-images", "2"]) == 0
    content = json.loads((tmp_path / "a/images.json").read_text())
    assert [entry["prompt"] for entry in content["images"]] == ["a red circle"] * 2 + ["a star"] * 2
    assert content["settings"] | {"sampler": "dpmpp_2m", "eta": 0.0, "threshold": "none"} == content["settings"]
    more = "--sampler ddim --eta 0.5 --guidance-interval 0.2 0.9 --threshold static --threshold-bound 3".split()
    assert main([*arguments, "--out", str(tmp_path / "c"), *more]) == 0
    settings = json.loads((tmp_path / "c/images.json").read_text())["settings"]
    assert settings["guidance_interval"] == [0.2, 0.9] and settings["threshold_bound"] == 3.0
    assert (tmp_path / "c/00000.png").read_bytes() != (tmp_path / "a/00000.png").read_bytes()
    for entry in content["images"]:
        assert (tmp_path / "a" / entry["file"]).read_bytes() == (tmp_path / "b" / entry["file"]).read_bytes()


def test_the_command_generates_at_the_size_that_is_asked_for(folder, tmp_path, capsys):
    from PIL import Image

    from raphael.cli.main import main

    command = ["generate", "a red circle", "--steps", "1", "--checkpoint", str(folder), "--out", str(tmp_path)]
    assert main([*command, "--size", "24x40"]) == 0
    assert Image.open(tmp_path / "00000.png").size == (40, 24)  # Pillow's order is width, height
    assert json.loads((tmp_path / "images.json").read_text())["settings"]["size_px"] == [24, 40]
    capsys.readouterr()
    assert main([*command, "--size", "20x40"]) == 1
    assert "got an image of 20 x 40 px, expected multiples of 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--size", "24"])
    assert "got '24', expected HxW such as 64x96" in capsys.readouterr().err


def test_a_model_trained_at_one_size_only_may_name_it_by_its_sides():
    from raphael.generate.pipeline import default_size

    assert default_size({"height_px": 48, "width_px": 64}) == (48, 64)
    assert default_size({"sizes_px": [[24, 40], [32, 32]]}) == (24, 40)


def test_the_command_shows_routes_and_parameters(folder, pipeline, capsys, tmp_path):
    from raphael.cli.main import main

    command = ["routes", "a red circle", "--checkpoint", str(folder), "--out", str(tmp_path / "routes.json")]
    assert main(command) == 0
    printed, blocks = capsys.readouterr().out, pipeline.unet.num_blocks
    assert "circle" in printed and f"a path has {blocks} entries" in printed
    saved = json.loads((tmp_path / "routes.json").read_text())
    assert saved["path_length"] == blocks and all(len(entry["experts"]) == blocks for entry in saved["words"])
    steps = pipeline.diffusion.num_steps
    assert saved["times"]["timesteps"] == list(range(steps))
    assert [len(row) for row in saved["times"]["experts"]] == [steps] * blocks
    assert main([*command, "--json"]) == 0
    words = json.loads(capsys.readouterr().out)["words"]
    assert [entry["word"] for entry in words] == ["<start>", "a", "red", "circle", "<end>"]
    assert main(["info", "--checkpoint", str(folder)]) == 0
    assert "space experts" in capsys.readouterr().out
    assert main(["info", "--preset", "tiny"]) == 0


def test_the_command_ends_in_one_line_where_there_is_no_checkpoint(tmp_path, capsys):
    from raphael.cli.main import main

    assert main(["generate", "a", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("module", ["raphael.cli", "raphael.generate", "raphael.evaluate", "raphael.evaluate.report"])
def test_help_answers_without_loading_torch(module):
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    code += f"try: runpy.run_module('{module}', run_name='__main__')\nexcept SystemExit: pass\n"
    code += (
        "heavy = {'torch', 'cv2', 'pyarrow', 'mlflow', 'PIL'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=write_pipeline.__globals__["ROOT"]
    )


def test_a_file_of_prompts_is_generated_as_one_call_would_and_resumes_where_it_was_killed(folder, tmp_path, capsys):
    from raphael.base.stage import write_json
    from raphael.cli.main import main
    from raphael.generate import jobs

    listed = [{"prompt": f"thing {i}", "suite": "s", "truth": None, "reference": f"r{i}"} for i in range(3)]
    write_json(tmp_path / "list.json", {"protocol": "p/v1", "prompts": [*listed, {"prompt": "own seed", "seed": 9}]})
    options = ["--checkpoint", str(folder), "--steps", "1", "--seed", "4", "--num-images", "2", "--batch-size", "4"]
    command = ["generate", "--prompts", str(tmp_path / "list.json"), *options, "--no-metadata", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert "8 images of 4 prompts" in capsys.readouterr().out
    listing = json.loads((tmp_path / "whole" / "images.json").read_text())
    assert [entry["index"] for entry in listing["images"]] == list(range(8))
    assert [entry.get("reference") for entry in listing["images"]] == ["r0", "r0", "r1", "r1", "r2", "r2", None, None]
    assert listing["settings"]["seed"] == 4 and listing["model"]
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.png")}
    assert drawn["00006.png"] == drawn["00007.png"], "both have the prompt's own seed"
    line = ["generate", *(entry["prompt"] for entry in listed), *options, "--no-metadata"]
    assert main([*line, "--out", str(tmp_path / "line")]) == 0
    for index in range(4):  # of the first batch, which is the same in both calls
        assert (tmp_path / "line" / f"{index:05d}.png").read_bytes() == drawn[f"{index:05d}.png"]

    with pytest.MonkeyPatch.context() as patch:
        draw = jobs.generate_entries
        patch.setattr(jobs, "generate_entries", lambda *a: (draw(*a), (_ for _ in ()).throw(KeyboardInterrupt))[0])
        assert main([*command, str(tmp_path / "killed")]) == 130
    assert len(list((tmp_path / "killed").glob("*.png"))) == 4
    assert main([*command, str(tmp_path / "killed")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.png")} == drawn
    capsys.readouterr()
    assert main([*command, str(tmp_path / "killed"), "--steps", "2"]) == 1
    assert "holds other images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        ("", [], "got no prompts"),
        ("{", [], "not readable as prompts"),
        ('{"prompts": [{"text": "a"}]}', [], "not readable as prompts (KeyError)"),
        ('{"prompts": [{"prompt": "a"}]}', ["a star"], "got both, expected prompts"),
        ('{"prompts": [{"prompt": "a"}]}', ["--show-edges"], "--show-edges: got it with --prompts"),
    ],
)
def test_a_file_that_holds_no_prompts_is_one_clear_line(tmp_path, capsys, content, arguments, says):
    from raphael.cli.main import main

    file = tmp_path / ("list.json" if content else "list.txt")
    file.write_text(content, encoding="utf-8")
    assert main(["generate", *arguments, "--prompts", str(file), "--out", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and says in errors[0]
    assert main(["generate", "--out", str(tmp_path / "out")]) == 1
    assert "got neither" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
