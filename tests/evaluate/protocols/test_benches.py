"""Exports: each layout read back by a few lines that do what the benchmark's own scorer does with names."""

import json
import os
import re

import numpy as np
from PIL import Image

from raphael.base.stage import read_json, write_json
from raphael.cli.main import main


def draw(folder, prompts, each, size=(6, 6), ending=".png"):
    """Picture number n is one flat colour, (n, 0, 0): it tells where it went."""
    folder.mkdir()
    entries = []
    for prompt in prompts:
        for _ in range(each):
            name = f"x{len(entries)}{ending}"
            Image.new("RGB", size, (len(entries), 0, 0)).save(folder / name)
            entries.append({"file": name, "prompt": prompt, "index": len(entries)})
    write_json(folder / "images.json", {"images": entries})
    return folder


def number_of(path, box=None):
    with Image.open(path) as image:
        return int(np.asarray(image.crop(box) if box else image)[0, 0, 0])


def export(bench, images, prompts, out):
    arguments = ["--bench", bench, "--images", str(images), "--prompts", str(prompts), "--out", str(out)]
    return main(["evaluate", "export", *arguments])


def test_geneval_finds_its_metadata_and_its_samples(tmp_path, capsys):
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
        {"tag": "again", "include": [], "prompt": "a photo of a bench"},
    ]
    source = tmp_path / "evaluation_metadata.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert main(["prompts", "--bench", "geneval", "--source", str(source), "--out", str(tmp_path / "p.json")]) == 0
    prompts = [entry["prompt"] for entry in read_json(tmp_path / "p.json")["prompts"]]
    assert prompts == [line["prompt"] for line in lines]
    assert export("geneval", draw(tmp_path / "a", prompts, 4), source, tmp_path / "out") == 0
    assert "the benchmark's own number" not in capsys.readouterr().out
    seen = {}
    for subfolder in os.listdir(tmp_path / "out"):  # as evaluate_images.py goes through it
        assert subfolder.isdigit() and len(subfolder) == 5
        with open(tmp_path / "out" / subfolder / "metadata.jsonl") as file:
            assert json.load(file) == lines[int(subfolder)]
        names = sorted(os.listdir(tmp_path / "out" / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        seen[int(subfolder)] = [number_of(tmp_path / "out" / subfolder / "samples" / name) for name in names]
    assert seen == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11]}


def test_dpg_cuts_its_grid_back_into_the_four_images(tmp_path):
    source = tmp_path / "dpg_bench.csv"
    source.write_text(
        "item_id,text,keywords,proposition_id,dependency\n"
        'COCOval1,"A long, winding text\nof two lines",,1,0\nCOCOval1,"A long, winding text\nof two lines",,2,1\n'
        "posescript3,Another one,,1,0\n"
    )
    texts = ["A long, winding text of two lines", "Another one"]
    assert export("dpg", draw(tmp_path / "a", texts, 4), source, tmp_path / "out") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["COCOval1.png", "posescript3.png"]
    side = 6
    boxes = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    assert [number_of(tmp_path / "out" / "posescript3.png", box) for box in boxes] == [4, 5, 6, 7]
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "COCOval1.txt").write_text(texts[0]), (folder / "posescript3.txt").write_text(texts[1])
    assert export("dpg", tmp_path / "a", folder, tmp_path / "same") == 0
    for name in os.listdir(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_t2i_compbench_reads_prompt_and_number_from_the_name(tmp_path, capsys):
    source = tmp_path / "color_val.txt"
    source.write_text("a green bench and a blue bowl\ta note\na red dog.\n")
    texts = ["a green bench and a blue bowl", "a red dog."]
    assert export("t2i-compbench", draw(tmp_path / "a", texts, 2, ending=".webp"), source, tmp_path / "out") == 0
    assert "own number is 10" in capsys.readouterr().out
    names = os.listdir(tmp_path / "out" / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))  # as BLIP_vqa.py does
    assert [name.split("_")[0] for name in names] == [texts[0]] * 2 + [texts[1]] * 2
    assert all(re.search(r"_\d{6}\.png$", name) for name in names)


def test_partiprompts_are_named_by_their_row(tmp_path):
    source = tmp_path / "PartiPrompts.tsv"
    source.write_text('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t-\na "sign"\tWorld\tWriting\t-\n')
    images = draw(tmp_path / "a", ['a "sign"', "bond"], 1)
    assert export("partiprompts", images, source, tmp_path / "out") == 0
    assert {name: number_of(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out")} == {
        "00000.png": 1,
        "00001.png": 0,
    }


def test_the_public_partiprompts_file_is_read_whole(shared_data, tmp_path):
    source = shared_data / "prompts" / "PartiPrompts.tsv"
    assert main(["prompts", "--bench", "partiprompts", "--source", str(source), "--out", str(tmp_path / "p.json")]) == 0
    by_protocol = [
        "prompts",
        "--protocol",
        "partiprompts/v1",
        "--source",
        str(source),
        "--out",
        str(tmp_path / "q.json"),
    ]
    assert main(by_protocol) == 0
    ours, theirs = ([e["prompt"] for e in read_json(tmp_path / name)["prompts"]] for name in ("p.json", "q.json"))
    assert [" ".join(prompt.split()) for prompt in ours] == theirs and len(ours) == 1632


def test_what_a_layout_cannot_hold_is_one_clear_line(tmp_path, capsys):
    def says(words, *arguments):
        assert export(*arguments) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    lines = tmp_path / "val.txt"
    lines.write_text("a cat\na dog\n")
    out = tmp_path / "out"
    cats = draw(tmp_path / "a", ["a cat"], 1)
    says("1 of 2 prompts have no image, the first is 1 'a dog'", "t2i-compbench", cats, lines, out)
    says("expected as many", "t2i-compbench", draw(tmp_path / "b", ["a cat", "a cat", "a dog"], 1), lines, out)
    lines.write_text("a_cat\n")
    says("cannot be a file's name", "t2i-compbench", draw(tmp_path / "c", ["a_cat"], 1), lines, out)
    says("expected PartiPrompts.tsv", "partiprompts", tmp_path / "a", tmp_path / "none.tsv", out)
    says("expected GenEval's", "geneval", tmp_path / "a", lines, out)
    table = tmp_path / "dpg.csv"
    table.write_text("item_id,text\n7,a cat\n")
    says("expected 4", "dpg", draw(tmp_path / "d", ["a cat"], 3), table, out)
    says("expected squares", "dpg", draw(tmp_path / "e", ["a cat"], 4, size=(6, 8)), table, out)
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "x").touch()
    assert export("dpg", draw(tmp_path / "f", ["a cat"], 4), table, tmp_path / "full") == 1
    assert "is not empty" in capsys.readouterr().err
