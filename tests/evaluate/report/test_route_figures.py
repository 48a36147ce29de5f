import csv
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from truth.tiny_raphael import write_pipeline

from raphael.base.config.preset import load_preset
from raphael.base.stage import StageError
from raphael.evaluate.report import route_figures
from raphael.evaluate.report.route_figures import (
    draw_times,
    draw_words,
    read_prompts,
    time_paths,
    word_paths,
    write_figures,
)
from raphael.generate.pipeline import RaphaelPipeline
from raphael.net.moe.unet import RaphaelUNet

PROMPTS = ["a red circle", "a Red star on a blue circle", "cat", "a red circle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


@pytest.fixture(scope="module")
def pipeline(folder):
    """The parts of a pipeline folder around a U-Net of the preset tiny-debug with random gates."""
    pipeline = RaphaelPipeline.from_pretrained(folder)
    torch.manual_seed(3)
    pipeline.unet = RaphaelUNet(load_preset("tiny-debug").unet).eval()
    with torch.no_grad():
        for block in pipeline.unet.transformer_blocks():
            for gate in (block.space_moe.gate, block.time_moe.gate):
                gate.net[0].weight.normal_()  # of their own mind from the start, else one expert takes nearly all
                gate.net[2].weight.normal_()
    return pipeline


def pixels(figure, tmp_path):
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def area(drawn, colour, rows=slice(None)):
    return int((np.abs(drawn[rows] - np.array(ImageColor.getrgb(colour))).max(-1) <= 2).sum())


def test_words_are_counted_by_the_expert_they_take_in_every_block(pipeline):
    """Against one token at a time through each block's gate."""
    paths, naive, ways = word_paths(pipeline, PROMPTS), {}, Counter()
    for prompt in PROMPTS:
        context = pipeline.encode([prompt]).tokens[0]
        for position, word in enumerate(pipeline.text_encoder.tokens_of(prompt)):
            if word.startswith("<"):
                continue
            with torch.no_grad():
                way = [
                    int(b.space_moe.gate.net(context[position]).argmax()) for b in pipeline.unet.transformer_blocks()
                ]
            ways[tuple(way)] += 1
            table = naive.setdefault(word.lower(), np.zeros((pipeline.unet.num_blocks, 3), int))
            table[range(len(way)), way] += 1
    assert {entry["word"]: entry["taken"] for entry in paths["words"]} == {w: t.tolist() for w, t in naive.items()}
    assert [entry["count"] for entry in paths["words"]][:2] == [4, 3] and paths["words"][0]["word"] == "a"
    assert paths["tokens"] == sum(ways.values()) == 14 and paths["distinct_paths"] == len(ways) > 3
    assert (paths["blocks"], paths["experts"], paths["prompts"]) == (pipeline.unet.num_blocks, 3, 4)


def test_timesteps_are_shared_out_as_each_block_s_gate_says(pipeline):
    paths, steps = time_paths(pipeline), pipeline.diffusion.num_steps
    for block, row in zip(pipeline.unet.transformer_blocks(), paths["table"], strict=True):
        for t in range(0, steps, 97):
            with torch.no_grad():
                assert row[t] == int(block.time_moe.gate.net(pipeline.unet.time_embedding(torch.tensor([t]))).argmax())
    for row, shares, runs in zip(paths["table"], paths["shares"], paths["runs"], strict=True):
        assert sum(shares) == pytest.approx(1) and shares[0] == sum(expert == 0 for expert in row) / steps
        again = [run["expert"] for run in runs for _ in range(run["from"] - run["to"] + 1)]
        assert again == row[::-1] and runs[0]["from"] == steps - 1 and runs[-1]["to"] == 0
        assert all(one["expert"] != other["expert"] for one, other in zip(runs[:-1], runs[1:], strict=True))
    assert any(len(runs) > 1 for runs in paths["runs"])


def test_the_area_of_a_colour_is_the_share_of_its_expert(tmp_path):
    """Figure 9's own numbers: expert 1 takes 59 % of the steps, the noisy ones."""
    table = [[1] * 410 + [0] * 590]
    runs = [[{"expert": 0, "from": 999, "to": 410}, {"expert": 1, "from": 409, "to": 0}]]
    drawn = pixels(draw_times({"num_steps": 1000, "experts": 2, "table": table, "runs": runs}), tmp_path)
    below = slice(len(drawn) // 2 - 20, len(drawn) // 2 + 60)  # the bar, without the legend
    first, second = (area(drawn, colour, below) for colour in route_figures.EXPERTS[:2])
    assert first / (first + second) == pytest.approx(0.59, abs=0.02)
    columns = np.nonzero((np.abs(drawn[below] - ImageColor.getrgb(route_figures.EXPERTS[0])).max(-1) <= 2).any(0))[0]
    assert columns.max() < drawn.shape[1] * 0.7  # at the left: noise

    words = [{"word": "red", "count": 4, "taken": [[3, 1], [0, 4]]}]
    paths = {"prompts": 4, "tokens": 4, "blocks": 2, "experts": 2, "distinct_paths": 2, "words": words}
    drawn = pixels(draw_words(paths), tmp_path)
    below = slice(int(1.2 * 160), None)
    first, second = (area(drawn, colour, below) for colour in route_figures.EXPERTS[:2])
    assert first / (first + second) == pytest.approx(3 / 8, abs=0.02)


def test_only_the_most_frequent_words_are_drawn_and_those_that_go_one_way_stand_together(tmp_path):
    ways = {"one": 0, "two": 1, "three": 0, "four": 1, "five": 2}
    words = [
        {"word": w, "count": 9 - i, "taken": [[9 * (k == way) for k in range(3)]]}
        for i, (w, way) in enumerate(ways.items())
    ]
    paths = {"prompts": 4, "tokens": 4, "blocks": 1, "experts": 3, "distinct_paths": 2, "words": words}
    labels = [label.get_text() for label in draw_words(paths, 4).axes[0].get_yticklabels()]
    assert labels == ["all words", "one", "three", "four", "two"]


def test_the_command_writes_both_figures_and_their_numbers(folder, tmp_path, capsys):
    from raphael.cli.main import main

    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n")
    out = tmp_path / "figures"
    command = ["figures", "--checkpoint", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--out"]
    assert main([*command, str(out)]) == 0 and main([*command, str(tmp_path / "again")]) == 0
    assert "figure5_words.png" in capsys.readouterr().out
    for name in ("figure5_words", "figure9_times"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 300
        for kind in ("png", "json", "csv"):
            assert (out / f"{name}.{kind}").read_bytes() == (tmp_path / "again" / f"{name}.{kind}").read_bytes()
    told = json.loads((out / "figure5_words.json").read_text())
    rows = list(csv.DictReader((out / "figure5_words.csv").open()))
    assert told["prompts"] == 2 and told["tokens"] == 6 and len(told["model"]) == 16
    for entry in told["words"]:
        for row in (row for row in rows if row["word"] == entry["word"]):
            assert int(row["tokens"]) == entry["taken"][int(row["block"]) - 1][int(row["expert"]) - 1]
    times = json.loads((out / "figure9_times.json").read_text())
    rows = list(csv.DictReader((out / "figure9_times.csv").open()))
    assert len(rows) == times["num_steps"] * len(times["table"])
    assert all(times["table"][int(r["block"]) - 1][int(r["timestep"])] == int(r["expert"]) - 1 for r in rows[::71])


def test_prompts_come_from_a_list_or_from_the_pipeline_s_own_file(tmp_path):
    (tmp_path / "a.txt").write_text(" one \n\ntwo\n")
    (tmp_path / "a.json").write_text('{"prompts": [{"prompt": "one"}, "two"]}')
    assert read_prompts(tmp_path / "a.txt") == read_prompts(tmp_path / "a.json") == ["one", "two"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.json").write_text("[")
    for name in ("empty.txt", "broken.json", "none.txt"):
        with pytest.raises(StageError, match=f"{name}: .*expected"):
            read_prompts(tmp_path / name)


def test_a_model_without_a_mixture_has_no_figure_of_it(pipeline, tmp_path):
    other = type(pipeline)(pipeline.unet, pipeline.diffusion, pipeline.autoencoder, pipeline.text_encoder, {})

    def with_layers(**layers):
        other.unet = RaphaelUNet(replace(load_preset("tiny-debug").unet, **layers))
        return other

    written = write_figures(with_layers(space_layer="dense"), tmp_path / "a", PROMPTS)
    assert [path.name for path in written] == ["figure9_times.png"]
    assert [p.name for p in write_figures(with_layers(time_layer="none"), tmp_path / "b", PROMPTS)] == [
        "figure5_words.png"
    ]
    with pytest.raises(ValueError, match="without Space-MoE and Time-MoE, expected one of them"):
        write_figures(with_layers(time_layer="none", space_layer="none"), tmp_path, PROMPTS)
    with pytest.raises(ValueError, match="number of words: got 0, expected at least 1"):
        write_figures(pipeline, tmp_path, PROMPTS, 0)
