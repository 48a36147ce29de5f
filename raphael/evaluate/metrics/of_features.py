"""Distances between the features of generated and of reference images, in every network that is there."""

from __future__ import annotations

from collections.abc import Iterator

from raphael.evaluate.metric import Found, Number
from raphael.evaluate.metrics.kernels import cmmd as cmmd_of
from raphael.evaluate.metrics.kernels import kid as kid_of
from raphael.evaluate.metrics.neighbours import DENSITY_K, PRECISION_K
from raphael.evaluate.metrics.neighbours import density_coverage as density_coverage_of
from raphael.evaluate.metrics.neighbours import precision_recall as precision_recall_of
from raphael.evaluate.subject import Pair, Subject


def frechet(subject: Subject) -> Found:
    found = Found()
    for pair in _pairs(subject):
        theirs = pair.theirs_statistics or pair.theirs.statistics()
        distance = pair.ours.statistics().distance(theirs)
        name, sha256 = pair.network.metric(pair.ours.count), pair.network.network
        found.numbers.append(Number(name, distance, sha256, reference=pair.reference))
    return found


def kid(subject: Subject) -> Found:
    found, rule = Found(), subject.rules.kid
    for pair in _pairs(subject):
        size = min(rule.subset_size, pair.ours.count, pair.theirs.count)
        mean, std = kid_of(pair.ours.array(), pair.theirs.array(), rule.subsets, size, rule.seed)
        more = {"std_of_subsets": std, "subset_size": size, "subsets": rule.subsets}
        found.numbers.append(Number(pair.network.name_of("kid"), mean, pair.network.network, more=more))
    return found


def cmmd(subject: Subject) -> Found:
    found = Found()
    for pair in _pairs(subject):
        if pair.network.kind == "clip":
            value = cmmd_of(pair.ours.array(), pair.theirs.array())
            found.numbers.append(Number(pair.network.name_of("cmmd"), value, pair.network.network))
    return found


def precision_recall(subject: Subject) -> Found:
    return _by_neighbours(subject, "precision_recall", precision_recall_of, PRECISION_K)


def density_coverage(subject: Subject) -> Found:
    return _by_neighbours(subject, "density_coverage", density_coverage_of, DENSITY_K)


def _by_neighbours(subject: Subject, metric: str, act, k: int) -> Found:
    found = Found()
    for pair in _pairs(subject):
        n, m = pair.ours.count, pair.theirs.count
        if min(n, m) <= k:
            found.absent[metric] = f"needs more than {k} pictures on each side, got {n} and {m}"
            continue
        for name, value in act(pair.ours.array(), pair.theirs.array(), k).items():
            found.numbers.append(Number(pair.network.name_of(name), value, pair.network.network, more={"k": k}))
    return found


def _pairs(subject: Subject) -> Iterator[Pair]:
    return (pair for pair in subject.pairs if pair.theirs is not None)
