import numpy as np
import pytest
import torch
from PIL import Image
from truth.tiny_raphael import write_pipeline

from raphael.evaluate.report.inside_sheet import COLUMNS, GAP_PX, LABEL_PX, MARGIN_PX, TILE_PX, TITLE_PX, inside_sheet
from raphael.generate.pipeline import RaphaelPipeline

STEP_X, STEP_Y = TILE_PX + GAP_PX, TILE_PX + LABEL_PX + GAP_PX
TOP = MARGIN_PX + TITLE_PX + TITLE_PX - 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return write_pipeline(tmp_path_factory.mktemp("model") / "raphael")


def tile(sheet, index):
    left, top = MARGIN_PX + index % COLUMNS * STEP_X, TOP + index // COLUMNS * STEP_Y
    return np.asarray(sheet)[top : top + TILE_PX, left : left + TILE_PX]


def test_a_sheet_holds_the_image_and_what_every_block_s_edge_head_said(folder):
    pipeline, said = RaphaelPipeline.from_pretrained(folder), []
    heads = [block.edge_head for block in pipeline.unet.transformer_blocks()]
    for head in heads:
        head.register_forward_hook(lambda module, args, out: said.append(out.sigmoid().numpy()))
    result = pipeline(["a red circle", "a star"], num_inference_steps=1, collect=True)
    assert len(said) == len(heads) == len(result.insight.block_edges)  # drawing itself asks no edge head
    largest = [edges for edges in said if edges.shape[-1] == 8]
    np.testing.assert_allclose(result.insight.edges, np.mean(largest, 0)[:, 0], rtol=1e-5)
    picture = np.asarray(result.images[1])
    sheet = inside_sheet(picture, "a star", result.insight, 1)
    assert np.array_equal(tile(sheet, 0)[2::4, 2::4], picture)  # 32 px, four times as large
    for index, edges in enumerate(said):
        np.testing.assert_array_equal(result.insight.block_edges[index], edges[:, 0])
        pixel = TILE_PX // edges.shape[-1]
        shown = tile(sheet, 2 + index)[pixel // 2 :: pixel, pixel // 2 :: pixel]
        np.testing.assert_allclose(shown, np.repeat(edges[1, 0, ..., None] * 255, 3, -1), atol=0.51)
    words = [word for word in result.insight.words[1] if word]
    rows = -(-(2 + len(heads)) // COLUMNS) + -(-len(words) // COLUMNS)
    assert sheet.size == (
        2 * MARGIN_PX + COLUMNS * STEP_X - GAP_PX,
        2 * MARGIN_PX + 3 * TITLE_PX + rows * STEP_Y - GAP_PX,
    )


def test_the_command_writes_a_sheet_beside_every_image_and_changes_no_image(folder, tmp_path, capsys):
    from raphael.cli.main import main

    command = ["generate", "a red circle", "--num-images", "2", "--steps", "1", "--checkpoint", str(folder), "--out"]
    assert main([*command, str(tmp_path / "plain")]) == 0
    assert main([*command, str(tmp_path / "seen"), "--show-edges"]) == 0
    assert str(tmp_path / "seen/inside/00001.png") in capsys.readouterr().out
    for name in ("00000.png", "00001.png", "images.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "seen" / name).read_bytes()
    sheets = [np.asarray(Image.open(tmp_path / "seen/inside" / name)) for name in ("00000.png", "00001.png")]
    assert sheets[0].shape == sheets[1].shape and not np.array_equal(*sheets)
    assert not (tmp_path / "plain/inside").exists()


def test_a_model_without_edge_heads_and_a_long_prompt_still_make_a_sheet(folder):
    from raphael.summary.insight import Insight

    random = np.random.default_rng(0)
    words = [[f"averylongwordnumber{i}" for i in range(50)]]
    insight = Insight(300, words, random.random((1, 50, 4, 6)), np.zeros((1, 4, 6)), [], np.zeros((1, 0, 50), int))
    sheet = inside_sheet(random.integers(0, 256, (64, 96, 3)).astype(np.uint8), "word " * 200, insight, 0)
    assert sheet.width == 2 * MARGIN_PX + COLUMNS * STEP_X - GAP_PX
    assert not tile(sheet, 2)[40:80].any()  # "no edge heads": black
