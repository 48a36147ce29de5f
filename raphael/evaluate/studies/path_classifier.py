"""Words read back from paths: XGBoost, five folds of whole sentences, trained gates against untrained ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

FOLDS, ROUNDS = 5, 30
RESAMPLES = 2000
# XGBoost's own defaults, written down (the paper names the library and no setting), but for the rounds: 30 instead of
# 100, since every round grows a tree per class
TREES = {"objective": "multi:softprob", "max_depth": 6, "eta": 0.3, "tree_method": "hist", "verbosity": 0}


@dataclass(frozen=True)
class Reading:
    """predicted (n,): the class each sample got from the classifier that never saw its sentence."""

    labels: np.ndarray
    sentences: np.ndarray
    folds: np.ndarray
    predicted: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    def by_fold(self) -> list[float]:
        return [float(self.right[self.folds == fold].mean()) for fold in np.unique(self.folds)]

    def by_sentence(self) -> np.ndarray:
        """(sentences,) accuracy of each, every one over all words."""
        return np.bincount(self.sentences, self.right) / np.bincount(self.sentences)

    def confusion(self) -> np.ndarray:
        """(classes, classes): share of each true class (row) that was read as each class; rows sum to 1."""
        classes = int(self.labels.max()) + 1
        counts = np.zeros((classes, classes))
        np.add.at(counts, (self.labels, self.predicted), 1.0)
        return counts / counts.sum(1, keepdims=True)


def folds_of(sentences: np.ndarray, seed: int = 0, folds: int = FOLDS) -> np.ndarray:
    """(n,) fold of each sample: all samples of one sentence in one. Raises ValueError for too few sentences."""
    number = int(sentences.max()) + 1
    if number < folds:
        raise ValueError(f"got {number} sentences, expected at least {folds}, the number of folds")
    return (np.random.default_rng(seed).permutation(number) % folds)[sentences]


def read_words(
    paths: np.ndarray, labels: np.ndarray, sentences: np.ndarray, experts: int, seed: int = 0, rounds: int = ROUNDS
) -> Reading:
    """Cross-validated predictions of labels (n,) from paths (n, blocks), entries 0 to experts - 1."""
    folds = folds_of(sentences, seed)
    predicted = np.empty(len(labels), np.int64)
    for fold in np.unique(folds):
        held = folds == fold
        predicted[held] = fit_predict(paths[~held], labels[~held], paths[held], experts, rounds)
    return Reading(labels, sentences, folds, predicted)


def fit_predict(
    paths: np.ndarray, labels: np.ndarray, asked: np.ndarray, experts: int, rounds: int = ROUNDS
) -> np.ndarray:
    """Boosted trees on one-hot entries. Equal rows of one class are one row with a weight: the same trees, sooner."""
    import xgboost

    rows, counts = np.unique(np.column_stack([paths, labels]), axis=0, return_counts=True)
    matrix = xgboost.DMatrix(one_hot(rows[:, :-1], experts), rows[:, -1], weight=counts)
    # one process: the answer must not depend on how many cores sum the gradients
    booster = xgboost.train(TREES | {"num_class": int(labels.max()) + 1, "nthread": 1}, matrix, rounds)
    different, back = np.unique(asked, axis=0, return_inverse=True)
    probability = booster.predict(xgboost.DMatrix(one_hot(different, experts)))
    return probability.argmax(1)[back.reshape(-1)]


def one_hot(paths: np.ndarray, experts: int) -> np.ndarray:
    """(n, blocks) -> (n, blocks * experts) float32."""
    return np.eye(experts, dtype=np.float32)[paths].reshape(len(paths), -1)


def difference(trained: Reading, untrained: list[Reading], seed: int = 0) -> tuple[float, float, float]:
    """Mean accuracy of trained minus untrained gates with its 95 % bootstrap interval, over sentences and over seeds.

    Both are drawn with replacement: the sentences are some of many, and so are the random gates. Widened by
    sqrt(s / (s - 1)), s seeds, the smaller of the two numbers (intervals.bootstrap_mean says why). Raises ValueError
    for fewer than two seeds. The trained model itself is one training run: the interval does not speak of others.
    """
    if len(untrained) < 2:
        raise ValueError(f"got {len(untrained)} sets of untrained gates, expected at least 2 for an interval")
    gains = trained.by_sentence()[None] - np.stack([reading.by_sentence() for reading in untrained])
    seeds, sentences = gains.shape
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for turn in range(RESAMPLES):
        part = gains[rng.integers(0, seeds, seeds)]
        means[turn] = part[:, rng.integers(0, sentences, sentences)].mean()
    centre, widen = float(gains.mean()), math.sqrt(seeds / (seeds - 1))
    low, high = centre + (np.percentile(means, (2.5, 97.5)) - centre) * widen
    return centre, float(low), float(high)
