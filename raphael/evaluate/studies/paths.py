"""Do words have ways of their own through the experts? RAPHAEL's path analysis (arXiv 2305.18295, section 3.1 and 7.5).

A path has one entry per transformer block: the space expert that the word's token takes. The paper reads words back
from 16 entries with XGBoost: 100 adjectives (above 93 %), COCO's 80 categories (94.3 %), 50 verbs (97.5 %), each in 100
sentences. But a gate is a function of the token's encoding, and the encodings of different words differ before any
gate has learnt anything: gates of random weights also send different words different ways. So the same classifier is
run on untrained gates over the same encodings, and only the difference says that routing learnt something about words.

Choices the paper leaves open. The word's token is its LAST one: in a causal encoder the only one that has read the
whole word. Folds are whole sentences: the classifier is asked about sentences it was not trained on. Entries are
categories, not numbers: expert 3 is not between 2 and 4.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raphael.base import strict
from raphael.base.config.systems import expect_system
from raphael.base.stage import StageError
from raphael.pretrained.find import find_pipeline

if TYPE_CHECKING:
    import torch

    from raphael.generate.pipeline import RaphaelPipeline

WORDS_FILE = Path(__file__).parent / "path_words.yaml"
ENCODE_BATCH = 256
KINDS = {"adjectives": "adjective", "nouns": "noun", "verbs": "verb"}
PAPER = {"adjectives": "> 93 %", "nouns": "94.3 %", "verbs": "97.5 %"}  # section 3.1, of a model of 3 billion weights


@dataclass(frozen=True)
class WordSet:
    """words, and sentences in which "{}" stands for the word; two of them never begin alike up to the word."""

    words: tuple[str, ...]
    sentences: tuple[str, ...]

    def __post_init__(self) -> None:
        starts = [sentence.partition("{}")[0] for sentence in self.sentences]
        wrong = [sentence for sentence in self.sentences if sentence.count("{}") != 1]
        if wrong:
            raise ValueError(f"sentences: got {wrong[0]!r}, expected one {{}} in each")
        for name, items in (("words", self.words), ("sentences up to the word", starts)):
            twice = [item for place, item in enumerate(items) if item in items[:place]]
            if twice:
                raise ValueError(f"{name}: got {twice[0]!r} twice, expected different ones")

    def samples(self) -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
        """-> [(text up to and with the word, word)], label (n,), sentence (n,): word by word."""
        texts = [(sentence.partition("{}")[0] + word, word) for word in self.words for sentence in self.sentences]
        labels = np.repeat(np.arange(len(self.words)), len(self.sentences))
        return texts, labels, np.tile(np.arange(len(self.sentences)), len(self.words))


def load_words(path: str | Path = WORDS_FILE) -> dict[str, WordSet]:
    """{"adjectives", "nouns", "verbs": WordSet}. Raises ConfigError that names file and key."""
    return {kind: strict.load(WordSet, part, str(path), kind) for kind, part in strict.read_yaml(path).items()}


def word_vectors(pipeline: RaphaelPipeline, words: WordSet, tick: Any = lambda n: None) -> np.ndarray:
    """What the gates read of each sample: float32 (n, context_dim), the encoding of the word's last token, after the
    network's own text layers where it has them.

    The whole sentence is encoded, as in sampling. Raises ValueError where a word is cut off by the encoder's length, or
    where its tokens depend on what follows.
    """
    import torch

    encoder = pipeline.text_encoder
    rows = []
    starts, labels, sentences = words.samples()
    for begin in range(0, len(starts), ENCODE_BATCH):
        part = slice(begin, begin + ENCODE_BATCH)
        texts = [words.sentences[s].replace("{}", words.words[k]) for k, s in zip(labels[part], sentences[part])]
        places = last_tokens(encoder, [start for start, _ in starts[part]], texts)
        with torch.inference_mode():
            encoding = encoder.encode(encoder.tokenize(texts).to(pipeline.device))
            context = pipeline.unet.refined(encoding.context, encoding.mask)
            rows.append(context[torch.arange(len(places)), torch.tensor(places)].float().cpu().numpy())
        tick(len(texts))
    return np.concatenate(rows)


def last_tokens(encoder: Any, starts: list[str], texts: list[str]) -> list[int]:
    """The position of the last token of each start within the tokens of its text."""
    cut, whole = encoder.tokenize(starts), encoder.tokenize(texts)
    # the end of the text is one closing token after the word: CLIP's and T5's tokenizers agree in that
    places = (encoder._mask(cut).sum(1) - 2).tolist()
    for place, start, one, other in zip(places, starts, cut, whole, strict=True):
        if place >= encoder.context_length - 2 or not bool((one[: place + 1] == other[: place + 1]).all()):
            raise ValueError(
                f"{start!r}: its last word is not whole among the first {encoder.context_length} tokens; "
                "expected a shorter sentence"
            )
    return places


def trained_gates(pipeline: RaphaelPipeline) -> list[Any]:
    """The space gates in the order of the forward pass."""
    return [block.space_moe.gate for block in pipeline.unet.transformer_blocks()]


def untrained_gates(gates: list[Any], seed: int) -> list[Any]:
    """Gates of the same shapes as they are before training: fresh weights, no balance bias; where the trained are."""
    import torch

    fresh = [copy.deepcopy(gate).cpu() for gate in gates]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for gate in fresh:
            for layer in gate.net:
                if hasattr(layer, "reset_parameters"):
                    layer.reset_parameters()
            gate.balance_bias.zero_()
    return [gate.to(own.net[0].weight.device) for gate, own in zip(fresh, gates, strict=True)]


def paths_of(gates: list[Any], vectors: np.ndarray) -> np.ndarray:
    """(n, C) encodings -> (n, blocks) int64: the expert each takes in each block, without noise."""
    import torch

    rows = []
    with torch.inference_mode():
        for gate in gates:
            device = gate.net[0].weight.device
            rows.append(gate.route(torch.from_numpy(vectors).to(device)).cpu().numpy())
    return np.stack(rows, axis=1)


def load_pipeline(checkpoint: str | Path, device: torch.device | str = "cpu") -> RaphaelPipeline:
    """Raises StageError where it has no routes to look at."""
    from raphael.base.checkpoint.folder import Stored
    from raphael.generate.pipeline import RaphaelPipeline

    folder = find_pipeline(checkpoint)
    expect_system(Stored(folder).meta, folder)
    pipeline = RaphaelPipeline.from_pretrained(folder, device=device)
    if pipeline.unet.config.num_space_experts < 2:
        raise StageError(f"{checkpoint}: has one space expert, so every path is the same; expected at least 2")
    return pipeline
