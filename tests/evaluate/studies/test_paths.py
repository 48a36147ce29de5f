"""The path analysis: which token, which folds, what a classifier can and cannot read, and the whole on a toy model."""

import copy

import numpy as np
import pytest
import torch
from truth.tiny_raphael import write_pipeline

from raphael.base.stage import read_json
from raphael.cli.main import main
from raphael.evaluate.studies import path_report
from raphael.evaluate.studies.path_classifier import Reading, difference, fit_predict, folds_of, one_hot, read_words
from raphael.evaluate.studies.paths import WordSet, last_tokens, load_words, paths_of, untrained_gates, word_vectors
from raphael.net.moe.gate import Gate

BLOCKS, EXPERTS, WORDS, SENTENCES = 6, 4, 12, 20


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from raphael.generate.pipeline import RaphaelPipeline

    folder = write_pipeline(tmp_path_factory.mktemp("model") / "raphael")
    pipeline = RaphaelPipeline.from_pretrained(folder)
    pipeline.folder = folder
    return pipeline


def samples(rng, noise):
    """Every word has a code of its own, in each sample a share `noise` of the entries is random."""
    codes = np.array([np.unravel_index(number * 331, [EXPERTS] * BLOCKS) for number in range(WORDS)])
    labels, sentences = np.repeat(np.arange(WORDS), SENTENCES), np.tile(np.arange(SENTENCES), WORDS)
    wild = rng.random((len(labels), BLOCKS)) < noise
    return np.where(wild, rng.integers(0, EXPERTS, wild.shape), codes[labels]), labels, sentences


def test_words_with_ways_of_their_own_are_read_and_words_without_are_not():
    rng = np.random.default_rng(0)
    clean, noisy, wild = (read_words(*samples(rng, noise), EXPERTS, rounds=10).accuracy for noise in (0.0, 0.1, 1.0))
    assert clean == 1.0 and noisy > 0.9
    deviation = np.sqrt(1 / WORDS * (1 - 1 / WORDS) / (WORDS * SENTENCES))
    assert abs(wild - 1 / WORDS) < 4 * deviation


def test_sentences_are_kept_apart_so_what_holds_in_one_sentence_alone_is_not_read():
    """A new code for every word in every sentence, each sample there twice: random folds read it, ours do not."""
    rng = np.random.default_rng(0)
    _, labels, sentences = samples(rng, 0.0)
    paths = np.array([rng.permutation(WORDS) for _ in range(SENTENCES)]).T.reshape(-1)  # word by word
    paths = np.column_stack(
        [paths % EXPERTS, paths // EXPERTS, sentences % EXPERTS, sentences // 4 % 4, sentences // 16]
    )
    paths, labels, sentences = (np.concatenate([part, part]) for part in (paths, labels, sentences))
    kept_apart = read_words(paths, labels, sentences, EXPERTS, rounds=10)
    assert kept_apart.accuracy < 3 / WORDS
    for sentence in range(SENTENCES):
        assert len(set(kept_apart.folds[sentences == sentence])) == 1
    assert sorted(np.bincount(kept_apart.folds) // (2 * WORDS)) == [4] * 5
    held = rng.permutation(len(labels)) % 5 == 0
    mixed = fit_predict(paths[~held], labels[~held], paths[held], EXPERTS, rounds=30)
    assert (mixed == labels[held]).mean() > 0.6


def test_equal_rows_as_one_row_with_a_weight_grow_the_trees_of_all_rows():
    from xgboost import XGBClassifier

    paths, labels, _ = samples(np.random.default_rng(1), 0.3)
    paths = paths[:, :3]  # few different rows
    asked = np.unique(paths, axis=0)
    peer = XGBClassifier(n_estimators=8, max_depth=6, learning_rate=0.3, tree_method="hist", n_jobs=1)
    peer.fit(one_hot(paths, EXPERTS), labels)
    ours, theirs = fit_predict(paths, labels, asked, EXPERTS, 8), peer.predict_proba(one_hot(asked, EXPERTS))
    best = theirs[np.arange(len(asked)), ours]
    assert np.allclose(best, theirs.max(1), atol=1e-4)  # the same answer, but where two classes tie


def test_the_word_is_known_by_its_last_token(pipeline):
    """Its tokens, spelt out up to that one, are the text up to the word; one more is too much."""
    starts = ["the umbrella", "a photo of the refrigerator", "xylophone", "in town, the hot dog"]
    texts = ["the umbrella over there", "a photo of the refrigerator", "xylophones", "in town, the hot dog stands"]
    texts[2] = "xylophone"
    for place, start, text in zip(last_tokens(pipeline.text_encoder, starts, texts), starts, texts, strict=True):
        pieces = pipeline.text_encoder.tokens_of(text)
        assert "".join(pieces[1 : place + 1]).replace("</w>", "") == start.replace(" ", "")
        assert pieces[place + 1] in ("<end>", text[len(start) :].split()[0] if text[len(start) :] else "<end>")
    with pytest.raises(ValueError, match="not whole"):
        last_tokens(pipeline.text_encoder, ["xylo"], ["xylophone"])
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    with pytest.raises(ValueError, match="shorter sentence"):
        last_tokens(pipeline.text_encoder, [long], [long])


def test_paths_are_the_routes_that_sampling_takes(pipeline):
    words = WordSet(("red", "green"), ("a {} star", "{}"))
    vectors = word_vectors(pipeline, words)
    found = paths_of([block.space_moe.gate for block in pipeline.unet.transformer_blocks()], vectors)
    texts = ["a red star", "red", "a green star", "green"]
    routes = pipeline.unet.space_routes(pipeline.encode(texts).tokens)  # (blocks, 4, N)
    truth = [routes[:, row, 1 + len(text.split()) - (2 if "star" in text else 1)] for row, text in enumerate(texts)]
    assert np.array_equal(found, torch.stack(truth).numpy())


def test_untrained_gates_are_new_gates_and_leave_everything_else_alone():
    torch.manual_seed(3)
    trained = Gate(8, 4, 0.5, 0.01, "straight_through")
    trained.balance_bias.fill_(0.3)
    before, state = copy.deepcopy(trained.state_dict()), torch.random.get_rng_state()
    (fresh,) = untrained_gates([trained], seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    torch.manual_seed(5)
    new = Gate(8, 4, 0.5, 0.01, "straight_through").state_dict()
    assert all(torch.equal(new[name], value) for name, value in fresh.state_dict().items())


def test_the_difference_to_untrained_gates_has_an_interval():
    labels, sentences = np.repeat([0, 1], 50), np.tile(np.arange(50), 2)
    folds = folds_of(sentences)

    def reading(right):
        return Reading(labels, sentences, folds, np.where(right, labels, 1 - labels))

    everything, nothing = np.ones(100, bool), np.zeros(100, bool)
    assert difference(reading(everything), [reading(nothing)] * 2) == (1.0, 1.0, 1.0)
    assert difference(reading(everything), [reading(everything)] * 3) == (0.0, 0.0, 0.0)
    rng = np.random.default_rng(0)
    half = [reading(rng.random(100) < 0.5) for _ in range(4)]
    centre, low, high = difference(reading(everything), half)
    assert centre == pytest.approx(np.mean([1 - part.accuracy for part in half])) and low < centre < high
    # sentences alone: the deviation of a mean of 50 sentences of two words each; seeds add to it
    by_sentence = np.mean([1 - part.by_sentence() for part in half], axis=0)
    assert high - low > 2 * 1.96 * by_sentence.std() / np.sqrt(50) * 0.9
    with pytest.raises(ValueError, match="at least 2"):
        difference(reading(everything), half[:1])


def test_the_words_and_sentences_are_as_many_as_the_papers_and_never_begin_alike():
    words = load_words()
    assert {kind: len(part.words) for kind, part in words.items()} == {"adjectives": 100, "nouns": 80, "verbs": 50}
    assert all(len(part.sentences) == 100 and part.sentences[0] == "{}" for part in words.values())
    with pytest.raises(ValueError, match="twice"):
        WordSet(("red",), ("a {} star", "a {} moon"))
    with pytest.raises(ValueError, match="expected one"):
        WordSet(("red",), ("a star",))


def test_the_command_writes_numbers_images_and_a_section(pipeline, tmp_path, monkeypatch, capsys):
    few = {
        "adjectives": WordSet(("red", "green", "blue"), tuple(f"{n} {{}} things" for n in "abcdef")),
        "nouns": WordSet(("cat", "green"), tuple(f"{n} {{}} here" for n in "abcdef")),
        "verbs": WordSet(("running", "singing"), tuple(f"{n} is {{}}" for n in "abcdef")),
    }
    monkeypatch.setattr(path_report, "load_words", lambda: few)
    out = tmp_path / "paths"
    assert main(["paths", str(pipeline.folder), "--untrained", "2", "--rounds", "3", "--out", str(out)]) == 0
    report = read_json(out / "paths.json")
    assert report["model"] == pipeline.identity and report["blocks"] == pipeline.unet.num_blocks
    for kind, part in few.items():
        found = report["kinds"][kind]
        assert found["chance"] == 1 / len(part.words) and len(found["untrained"]) == 2
        others = np.mean([other["accuracy"] for other in found["untrained"]])
        assert found["difference"]["mean"] == pytest.approx(found["trained"]["accuracy"] - others)
    assert sorted(path.name for path in out.glob("*.png")) == sorted(
        ["accuracy.png", "times.png", "words.png", *(f"confusion-{kind}.png" for kind in few)]
    )
    assert {kind: list(placed) for kind, placed in report["map"]["words"].items()} == {
        kind: list(part.words) for kind, part in few.items()
    }
    section = (out / "section.html").read_text(encoding="utf-8")
    assert section.startswith('<section id="paths"') and section.count("data:image/png;base64,") == 5
    assert "untrained gates" in capsys.readouterr().out
    assert main(["paths", str(pipeline.folder), "--untrained", "1", "--out", str(out)]) == 1
