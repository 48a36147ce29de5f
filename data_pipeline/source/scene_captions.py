"""What people would write below a drawn scene: many sentence forms, one fixed name for every colour and shape.

`caption` returns the words and the truth that they state; what is left unsaid is null in that truth. Training captions
leave things out now and then, as captions do; a held-out prompt always states style and background.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from data_pipeline.source.scenes import SUITES, Scene, Thing, heldout_scene

STYLE_AFTER = {  # "a red circle on a blue background, ..."
    "flat": ("flat design", "flat style", "in a flat style"),
    "outline": ("outline drawing", "outline style", "drawn in outline"),
    "ink": ("ink drawing", "ink style", "drawn in ink"),
    "pixel": ("pixel art", "pixel style", "in pixel art style"),
}
STYLE_BEFORE = {  # "... a red circle on a blue background"
    "flat": ("a flat picture of", "flat design of", "a flat drawing of"),
    "outline": ("an outline drawing of", "an outline picture of", "outline drawing of"),
    "ink": ("an ink drawing of", "an ink picture of", "ink drawing of"),
    "pixel": ("pixel art of", "a pixel art picture of", "a pixel drawing of"),
}
STYLE_NONE = ("a picture of", "an image of", "a drawing of", "", "", "")
ON = {
    "plain": ("on a plain {0} background", "against a plain {0} background", "on plain {0}"),
    "gradient": ("on {1} {0} gradient background", "on {1} {0} gradient", "against {1} {0} gradient background"),
    None: ("on {1} {0} background", "against {1} {0} background", "on {0}", "with {1} {0} background"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "directly above"),
    "below": ("below", "under"),
}
WORD_FORMS = (
    'with the word "{0}"',
    "with the word {0}",
    'and the text "{0}"',
    "with {0} written below",
    "and the word {0}",
)
NUMBERS = {1: "one", 2: "two", 3: "three"}


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> tuple[str, dict[str, Any]]:
    """A sentence about the scene and what it states. complete: leave out neither style nor background."""
    truth = scene.truth()
    subject = _subject(scene, truth, rng)
    if complete or rng.random() < 0.93:
        kind = scene.background_kind if rng.random() < 0.5 else None
        truth["background"]["kind"] = kind
        background = rng.choice(ON[kind]).format(scene.background, _article(scene.background))
    else:
        truth["background"] = {"colour": None, "kind": None}
        background = ""
    if complete or rng.random() < 0.88:
        if rng.random() < 0.6:
            before, after = rng.choice(STYLE_NONE), rng.choice(STYLE_AFTER[scene.style])
        else:
            before, after = rng.choice(STYLE_BEFORE[scene.style]), ""
    else:
        truth["style"] = None
        before, after = rng.choice(STYLE_NONE), ""
    if background.startswith("on ") and rng.random() < 0.08 and not before:
        text = f"{background}, {subject}"
    else:
        text = " ".join(part for part in (before, subject, background) if part)
    text = f"{text}, {after}" if after else text
    return _finish(text, rng), truth


def heldout_prompts(
    seed: int, number: int, side_px: int, heldout_share: float, stream: str = "", avoid: Collection[str] = ()
) -> list[dict[str, Any]]:
    """`number` prompts of each suite, in the form of prompts.json.

    Within a suite no two are the same while that is possible. stream: of other scenes (`heldout_scene`); avoid:
    prompts that are never among them.
    """
    prompts = []
    for suite in SUITES:
        seen: list[str] = []
        candidate = 0
        while len(seen) < number:
            slot = len(seen)  # decides the count in the suite "count", so that 1, 2 and 3 come equally often
            scene = heldout_scene(seed, suite, candidate * 3 + slot % 3, side_px, heldout_share, stream)
            text, truth = caption(scene, random.Random(f"{seed}/{stream}{suite}/{candidate}/words"), complete=True)
            candidate += 1
            if text in avoid or (text in seen and candidate < 20 * number):
                continue
            seen.append(text)
            prompts.append({"prompt": text, "suite": suite, "truth": truth, "reference": None})
    return prompts


def _subject(scene: Scene, truth: dict[str, Any], rng: random.Random) -> str:
    things, objects = scene.things, truth["objects"]
    names = [_noun(thing, stated, rng) for thing, stated in zip(things, objects, strict=True)]
    if scene.layout == "count":
        for stated in objects:
            stated.update(size=None, texture=objects[0]["texture"])
        words = _adjectives(things[0], objects[0]["size"], objects[0]["texture"])
        return f"{NUMBERS[len(things)]} {words} {_plural(things[0].shape, len(things))}"
    if scene.relation:
        kind = scene.relation
        if rng.random() < 0.15:  # the same fact, told from the other side
            kind = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[kind]
            truth["relation"] = {"kind": kind, "subject": 1, "object": 0}
            names.reverse()
        return f"{names[0]} {rng.choice(RELATION_WORDS[kind])} {names[1]}"
    if len(names) > 1:
        return ", ".join(names[:-1]) + f" and {names[-1]}"
    if scene.word:
        return f"{names[0]} {rng.choice(WORD_FORMS).format(scene.word)}"
    return names[0]


def _noun(thing: Thing, stated: dict[str, Any], rng: random.Random) -> str:
    if stated["size"] and rng.random() < 0.25:
        stated["size"] = None
    if thing.texture == "solid":
        stated["texture"] = None
    words = _adjectives(thing, stated["size"], stated["texture"])
    return f"{_article(words)} {words} {thing.shape}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _adjectives(thing: Thing, size: str | None, texture: str | None) -> str:
    return " ".join(word for word in (size, texture, thing.colour) if word)


def _plural(shape: str, count: int) -> str:
    if count == 1:
        return shape
    return shape + ("es" if shape.endswith("s") else "s")


def _finish(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.10 else text
