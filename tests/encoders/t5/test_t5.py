"""The small T5: its tokenizer, its class, its folder; and what it learns by span corruption in seconds."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from raphael.base.config.params import T5Config
from raphael.base.randomness import SampleRng
from raphael.encoders.pretrained import HERE, PretrainedError, write_pointer
from raphael.encoders.t5.build import build_t5, save_encoder
from raphael.encoders.t5.tokenizer import SENTINELS, load_tokenizer, train_tokenizer
from raphael.encoders.t5.unigram import expected, learn_pieces, seeds
from raphael.encoders.text import load_text_encoder
from raphael.objectives.span_corruption import SpanCorruption

COLOURS, SHAPES = ("red", "green", "blue", "orange"), ("circle", "square", "star", "heart")
CAPTIONS = [
    f"a {colour} {shape} on a {ground} background"
    for colour in COLOURS for shape in SHAPES for ground in ("white", "black", "grey")
]  # fmt: skip
SMALL = T5Config(width=16, heads=2, hidden=32, layers=1, vocabulary=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    train_tokenizer(CAPTIONS, SMALL.vocabulary, folder)
    torch.manual_seed(0)
    save_encoder(build_t5(SMALL, len(load_tokenizer(folder))), folder)
    write_pointer(folder, f"t5:{HERE}", {"context_length": 12})
    return folder


def test_the_tokenizer_gives_captions_back_and_knows_an_end_and_sentinels(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1
    assert len(set(tokenizer.convert_tokens_to_ids(list(SENTINELS)))) == len(SENTINELS)
    for caption in CAPTIONS:
        ids = tokenizer(caption)["input_ids"]
        assert ids[-1] == 1 and 2 not in ids and tokenizer.decode(ids[:-1]) == caption
    assert len(tokenizer("a red circle")["input_ids"]) <= 6, "words that come often are pieces of their own"
    assert tokenizer("")["input_ids"] == [1]


def cuts(word: str) -> list[list[str]]:
    return [[]] if not word else [[word[:n], *rest] for n in range(1, len(word) + 1) for rest in cuts(word[n:])]


def test_a_step_of_expectation_is_the_sum_over_all_cuts_and_raises_the_likelihood() -> None:
    words = {"red": 3, "reed": 2, "bred": 1}
    letters = set("".join(words))
    pieces = seeds(words, letters, 100)

    def likelihood(pieces: dict[str, float]) -> float:
        return sum(
            n * math.log(sum(math.prod(pieces.get(p, 0.0) for p in cut) for cut in cuts(w))) for w, n in words.items()
        )

    by_hand = dict.fromkeys(pieces, 0.0)
    for word, count in words.items():
        weights = [math.prod(pieces.get(piece, 0.0) for piece in cut) for cut in cuts(word)]
        for cut, weight in zip(cuts(word), weights, strict=True):
            for piece in cut:
                if piece in by_hand:
                    by_hand[piece] += count * weight / sum(weights)
    assert expected(words, pieces) == pytest.approx(by_hand)
    before = likelihood(pieces)
    total = sum(by_hand.values())
    assert likelihood({piece: count / total for piece, count in by_hand.items()}) > before
    learned = dict(learn_pieces(words, 8))
    assert letters <= learned.keys() and len(learned) <= 8 and "red" in learned
    assert sum(map(math.exp, learned.values())) == pytest.approx(1.0)


def test_the_same_captions_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(CAPTIONS), SMALL.vocabulary, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_folder_stands_for_itself_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "text_encoder"
    shutil.copytree(folder, moved)
    encoder = load_text_encoder(moved)
    assert (encoder.kind, encoder.context_length, encoder.dim) == ("t5", 12, 16)
    encoding = encoder.encode(encoder.tokenize(["a red circle", ""]))
    assert encoding.context.shape == (2, 12, 16) and encoding.mask.sum(1).tolist()[1] == 1
    other = load_text_encoder(f"t5:{folder}", context_length=12)
    assert torch.equal(encoding.context, other.encode(other.tokenize(["a red circle", ""])).context)
    assert torch.equal(encoder.mask_of(encoder.tokenize(["a red circle"])), encoding.mask[:1])


def test_the_encoder_is_transformers_own(folder: Path) -> None:
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    whole = build_t5(SMALL, len(load_tokenizer(folder))).eval()
    assert type(whole).__name__ == "T5ForConditionalGeneration"
    ids = torch.tensor(load_tokenizer(folder)(CAPTIONS[:1])["input_ids"])
    alone = T5EncoderModel.from_pretrained(folder).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(alone, whole.encoder(input_ids=ids).last_hidden_state)


def test_a_path_that_is_no_t5_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip/config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    with pytest.raises(PretrainedError, match="got .*clip, a model of type clip, expected a T5") as caught:
        load_text_encoder(f"t5:{tmp_path}/clip")
    assert "\n" not in str(caught.value)
    with pytest.raises(PretrainedError, match="no-such-folder"):
        load_text_encoder(f"t5:{tmp_path}/no-such-folder")


def test_settings_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="width: got 30, expected a multiple of heads 4"):
        dataclasses.replace(SMALL, width=30, heads=4)
    with pytest.raises(PretrainedError, match="clip.t5.vocabulary: got 20, 19 of them special: got 1 pieces for"):
        train_tokenizer(CAPTIONS, 20, Path("never"))
    assert not Path("never").exists()


def test_two_hundred_steps_of_span_corruption_teach_it_captions(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor(tokenizer(CAPTIONS, padding="max_length", max_length=14)["input_ids"])
    torch.manual_seed(0)
    t5 = build_t5(dataclasses.replace(SMALL, width=32, hidden=64), len(tokenizer))
    objective = SpanCorruption(t5, tokenizer.convert_tokens_to_ids(list(SENTINELS)), share=0.3, mean_span=2.0)
    optimizer, found = torch.optim.AdamW(objective.parameters(), lr=1e-2), []
    for step in range(120):
        rows = np.random.default_rng(step).integers(0, len(CAPTIONS), 16)
        outputs = objective({"token_ids": ids[rows]}, SampleRng(0, step, rows))
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(outputs["loss"].item())
    assert np.mean(found[-10:]) < 0.5 * np.mean(found[:3])
    assert outputs["accuracy"] > 0.5, "colours, shapes and grounds can only be guessed; the rest is known"
