"""Fresh held-out scenes beside the reporting prompts: those of the probe, and prompts for choosing settings by.

The probe's captions come twice: as they are, and with one fact of the scene exchanged, in the same sentence form. A
stream of its own gives each purpose other scenes than prompts.json and the training rows have; a caption that another
purpose has already is passed over.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from data_pipeline.source.scene_captions import caption
from data_pipeline.source.scene_drawing import draw
from data_pipeline.source.scenes import COLOURS, SHAPES, STYLES, SUITES, WORDS, Scene, heldout_scene
from raphael.base.probe_set import Exchange, ProbeSet

STREAM = "probe/"
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OTHER_COUNT = {1: 2, 2: 3, 3: 2}

Change = Callable[[Scene, random.Random], Scene]


def _other(rng: random.Random, names: Collection[str], taken: Collection[str]) -> str:
    return rng.choice([name for name in names if name not in taken])


def _first(scene: Scene, **changes: str) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes), *scene.things[1:]))


def _shape(scene: Scene, rng: random.Random) -> Scene:
    return _first(scene, shape=_other(rng, SHAPES, [thing.shape for thing in scene.things]))


def _colour(scene: Scene, rng: random.Random) -> Scene:
    return _first(scene, colour=_other(rng, COLOURS, (scene.things[0].colour, scene.background)))


def _background(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, background=_other(rng, COLOURS, (scene.things[0].colour, scene.background)))


def _style(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, style=_other(rng, STYLES, (scene.style,)))


def _count(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, things=scene.things[:1] * OTHER_COUNT[len(scene.things)])


def _side(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, relation=OPPOSITE[scene.relation])


def _binding(scene: Scene, rng: random.Random) -> Scene:
    one, other = scene.things
    return replace(scene, things=(replace(one, colour=other.colour), replace(other, colour=one.colour)))


def _word(scene: Scene, rng: random.Random) -> Scene:
    return replace(scene, word=_other(rng, WORDS, (scene.word,)))


EXCHANGES: dict[str, dict[str, Change]] = {  # suite -> fact -> the scene that the wrong caption speaks of
    "single": {"shape": _shape, "colour": _colour, "background": _background, "style": _style},
    "relation": {"pair_shape": _shape, "side": _side, "binding": _binding},
    "count": {"count": _count},
    "text": {"word": _word},
}


def probe_set(seed: int, n: int, side_px: int, heldout_share: float, avoid: Collection[str]) -> ProbeSet:
    """n scenes of each suite, with every fact of EXCHANGES exchanged once. avoid: captions that may not be among them.

    The wrong caption is that of the exchanged scene by the same random numbers: it differs in the fact and, where
    grammar asks for it, in an article or a plural.
    """
    images, texts, suites, truths = [], [], [], []
    facts: dict[str, Exchange] = {}
    seen = set(avoid)
    for suite in SUITES:
        wrong: dict[str, list[str]] = {fact: [] for fact in EXCHANGES[suite]}
        first, candidate = len(texts), 0
        while len(texts) - first < n:
            slot = len(texts) - first  # decides the count in the suite "count"
            scene = heldout_scene(seed, suite, candidate * 3 + slot % 3, side_px, heldout_share, STREAM)
            words = f"{seed}/{STREAM}{suite}/{candidate}/words"
            candidate += 1
            text, truth = caption(scene, random.Random(words), complete=True)
            if text in seen:
                continue
            seen.add(text)
            for fact, change in EXCHANGES[suite].items():
                exchanged = change(scene, random.Random(f"{words}/{fact}"))
                wrong[fact].append(caption(exchanged, random.Random(words), complete=True)[0])
            texts.append(text)
            images.append(np.asarray(draw(scene)))
            suites.append(suite)
            truths.append(truth)
        rows = np.arange(first, len(texts))
        facts |= {fact: Exchange(rows, captions) for fact, captions in wrong.items()}
    return ProbeSet(np.stack(images), texts, suites, truths, facts)
