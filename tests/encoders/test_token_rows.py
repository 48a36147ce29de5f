"""A text encoder whose rarely used tokens share one row, against the whole table."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from truth.tiny_raphael import write_pipeline

from raphael.encoders.clip import WEIGHTS, load_clip_folder
from raphael.encoders.pretrained import PretrainedError
from raphael.encoders.text import load_text_encoder
from raphael.encoders.token_rows import IDS, ROWS, TABLE, shared_table, whole_table

SIZE = 40


def tensors():
    return {TABLE: torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0)), "other": torch.ones(2)}


def test_used_rows_come_back_to_the_bit_and_all_others_are_one_row_of_the_table():
    before, ids = tensors(), [7, 3, 0, 39]
    small = shared_table(before, ids)
    assert small[ROWS].shape == (5, 3) and small[IDS].tolist() == [0, 3, 7, 39] and TABLE not in small
    after = whole_table(small, SIZE)
    assert after.keys() == before.keys() and torch.equal(after["other"], before["other"])
    for token in range(SIZE):
        assert torch.equal(after[TABLE][token], before[TABLE][token if token in ids else 1])


def test_shared_once_more_the_same_bytes_come_out():
    small = shared_table(tensors(), [0, 1, 5])
    again = shared_table(whole_table(small, SIZE), [0, 1, 5])
    assert all(torch.equal(small[name], again[name]) for name in (ROWS, IDS, "other"))


@pytest.mark.parametrize("ids", [[], [3, 3], [-1], [SIZE], list(range(SIZE))])
def test_ids_that_leave_no_row_to_share_or_are_none_of_the_table_are_refused(ids):
    with pytest.raises(ValueError, match="token ids, expected different ones of 0 to 39, not all"):
        shared_table(tensors(), ids)


def test_a_whole_table_is_left_as_it_is_and_a_wrong_id_is_an_error():
    before = tensors()
    assert whole_table(before, SIZE) is before
    with pytest.raises(ValueError, match="expected one more, ids below 4"):
        whole_table(shared_table(before, [0, 5]), 4)


def test_an_encoder_stored_so_encodes_its_words_to_the_bit_and_strange_words_alike(tmp_path):
    folder = write_pipeline(tmp_path / "model") / "text_encoder"
    whole = load_text_encoder(folder)
    ids = whole.tokenize(["a red circle", ""]).unique().tolist()
    save_file(shared_table(load_file(folder / WEIGHTS), ids), folder / WEIGHTS)
    small = load_text_encoder(folder)
    known = whole.tokenize(["a red circle", "circle red a"])
    assert torch.equal(small.encode(known).context, whole.encode(known).context)
    strange = small.encode(small.tokenize(["a gorgeous circle", "a splendid circle"])).context
    assert strange.isfinite().all() and torch.equal(strange[0], strange[1])
    assert not torch.equal(strange[0], small.encode(known).context[0])
    assert load_clip_folder(folder).model.token_embedding.weight.shape[0] == 49408


def test_a_damaged_table_is_one_line(tmp_path):
    folder = write_pipeline(tmp_path / "model") / "text_encoder"
    small = shared_table(load_file(folder / WEIGHTS), [0, 1])
    save_file({**small, ROWS: small[ROWS][:1].clone()}, folder / WEIGHTS)
    with pytest.raises(PretrainedError, match="do not fit or are damaged .*rows of tokens") as caught:
        load_text_encoder(folder)
    assert "\n" not in str(caught.value) and json.loads((folder / "config.json").read_text())
