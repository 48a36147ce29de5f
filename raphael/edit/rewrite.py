"""Editing by words: replace, refine, re-weight; what is outside the edited object may be held to the source's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.diffusion.denoiser import Denoiser
from raphael.edit.attention import AttentionEditor, MapRecorder
from raphael.edit.invert import for_pictures, start_of
from raphael.edit.known import FEATHER_PX, pasted
from raphael.edit.run import Edited, How, Session, check_share, split
from raphael.edit.words import Words, attended_encoder_of, recolours, refined, replaced, words_of
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import Condition

Places = list[tuple[str, list[int]]]  # a word and its tokens


@dataclass(frozen=True)
class Keep:
    """How much of the source stays.

    cross: share of the steps whose cross-attention is the source's; by_word: another for words of the target.
    self_attention: the same of self-attention, on maps of at most `self_map` of the largest map's pixels.
    blend: words (of source or target) outside whose attention the image stays the source's, but for a margin of
    FEATHER_PX; (): no such bound; None: the words that `replace` exchanges, and () where nothing is exchanged.
    threshold: share of its maximum from which on a word's attention counts as the word's place.
    """

    cross: float = 0.8
    self_attention: float = 0.4
    self_map: float = 1.0
    by_word: Mapping[str, float] = field(default_factory=dict)
    blend: tuple[str, ...] | None = ()
    threshold: float = 0.3

    def __post_init__(self) -> None:
        for name in ("cross", "self_attention", "self_map", "threshold"):
            check_share(name, getattr(self, name))
        for word, share in self.by_word.items():
            check_share(f"cross of {word!r}", share)


RECOLOURING = Keep(1.0, 1.0, blend=None, threshold=0.6)  # measured in docs/guides/edit.md


def kept(kind: str, source: str = "", target: str = "", **asked: Any) -> Keep:
    """What an edit keeps by default, with what is asked for in its place; None is not asked for.

    `replace` of colours alone keeps all of the source's layout and, by `RECOLOURING`, what is outside. Of other words
    it does not: a star drawn with a circle's maps at every step is a circle.
    """
    own = RECOLOURING if kind == "replace" and recolours(source, target) else Keep()
    return dataclasses.replace(own, **{name: value for name, value in asked.items() if value is not None})


@dataclass(frozen=True)
class _Asked:
    kind: str
    how: How
    keep: Keep
    image: np.ndarray | None = None


@dataclass(frozen=True)
class Blended:
    """A Denoiser of groups of n rows: the second group's estimate is the first's wherever inside_n1hw is False.

    The two begin with one noise, so with every sampler that treats latents one by one (all of ours) the second group's
    latents are the first's there to the bit, at every step.
    """

    denoiser: Denoiser
    inside_n1hw: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        x0, n = self.denoiser(x, sigma, cond), len(self.inside_n1hw)
        blended = torch.where(self.inside_n1hw, x0[n : 2 * n], x0[:n])
        return torch.cat([x0[:n], blended, x0[2 * n :]])


def replace(
    pipeline: Pipeline,
    source: str,
    target: str,
    how: How = How(),  # noqa: B008
    keep: Keep | None = None,
    image: np.ndarray | None = None,
) -> Edited:
    """Words exchanged, one for one: "a red circle" -> "a blue circle". without: the target's image of the same seed.

    keep: None is what `kept` says for these prompts. image: a picture, uint8 (H, W, 3), that the source prompt
    describes, edited in the place of a drawn one.
    Raises ValueError for unequal numbers of words, and what `words_of` refuses.
    """
    old, new = _both(pipeline, source, target)
    keep = kept("replace", source, target) if keep is None else keep
    matrix, everything = replaced(old, new), torch.ones(new.length, dtype=torch.bool)
    return _rewrite(pipeline, (old, new), matrix, everything, {}, _Asked("replace", how, keep, image))


def refine(
    pipeline: Pipeline,
    source: str,
    target: str,
    how: How = How(),  # noqa: B008
    keep: Keep = Keep(),  # noqa: B008
    image: np.ndarray | None = None,
) -> Edited:
    """Words added or taken away: tokens that both prompts have keep the source's maps, the others have their own."""
    old, new = _both(pipeline, source, target)
    matrix, taken = refined(old, new)
    return _rewrite(pipeline, (old, new), matrix, taken, {}, _Asked("refine", how, keep, image))


def reweight(
    pipeline: Pipeline,
    prompt: str,
    factors: Mapping[str, float],
    how: How = How(),  # noqa: B008
    keep: Keep = Keep(),  # noqa: B008
) -> Edited:
    """Words of one prompt, louder or softer: their attention times a factor. Raises ValueError for an absent word."""
    if not factors:
        raise ValueError("factors: got none, expected a number for at least one word")
    words, _ = _both(pipeline, prompt, prompt)
    everything = torch.ones(words.length, dtype=torch.bool)
    matrix = replaced(words, words)
    return _rewrite(pipeline, (words, words), matrix, everything, factors, _Asked("reweight", how, keep))


def _both(pipeline: Pipeline, source: str, target: str) -> tuple[Words, Words]:
    encoder = attended_encoder_of(pipeline)
    return words_of(encoder, source), words_of(encoder, target)


def _rewrite(
    pipeline: Pipeline,
    words: tuple[Words, Words],
    matrix: Tensor,
    taken: Tensor,
    factors: Mapping[str, float],
    asked: _Asked,
) -> Edited:
    (old, new), how, keep, kind, image = words, asked.how, asked.keep, asked.kind, asked.image
    places = _places((old, new), keep.blend, kind)
    session = Session(pipeline, how if image is None else for_pictures(pipeline, how))
    begin: dict[str, Any] = {}
    if image is not None:
        begin = {"start": start_of(session, image, old.prompt).repeat(3, 1, 1, 1), "negative_prompt": old.prompt}
    editor = AttentionEditor(
        session.count,
        matrix,
        taken,
        _by_token(new, keep.cross, keep.by_word),
        _by_token(new, 1.0, factors),
        keep.self_attention,
        round(keep.self_map * _largest(session)),
    )
    recorder = MapRecorder(editor.hooks)
    hooks = recorder.hooks if any(places) else editor.hooks
    pair, plain = session.condition(old.prompt, new.prompt), session.condition(new.prompt)
    latents = session.draw(pair.with_hooks(hooks).concat(plain), **begin)
    shown = {} if image is None else {"the picture": np.repeat(image[None], session.count, 0)}
    blend = list(dict.fromkeys(name for own in places for name, _ in own))
    if blend:
        inside = blend_mask(recorder.mean(), places, keep.threshold, session.parts.latent_shape[1:])
        cond = pair.with_hooks(editor.hooks).concat(plain)
        latents = session.draw(cond, lambda denoiser: Blended(denoiser, inside), **begin)
        shown |= {f"edited where white: {', '.join(blend)}": _white(inside, session.size_px)}
    source, result, without = split(session.decode(latents), 3)
    if blend:  # the decoder reads neighbours: of equal latents it makes other pixels near the mask
        masks = _white(inside, session.size_px)[..., 0] > 0
        rows = zip(source, result, masks, strict=True)
        result = np.stack([pasted(own, drawn[None], mask, FEATHER_PX)[0] for own, drawn, mask in rows])
    facts = session.facts(
        kind,
        prompt=old.prompt,
        target=new.prompt,
        keep={**vars(keep), "by_word": dict(keep.by_word), "blend": blend},
        factors=dict(factors),
        pooled_text=pipeline.unet.config.pooled_text,  # where true, words also go a way that no map shows
    )
    labels = (old.prompt, f"{kind}: {new.prompt}" if not factors else f"reweight: {dict(factors)}", new.prompt)
    return Edited(source, result, without, labels, facts, shown)


def blend_mask(maps_RhwN: Tensor, places: tuple[Places, Places], threshold: float, size: tuple[int, int]) -> Tensor:
    """(n, 1, h, w) bool: where sources or targets (2n rows of mean maps) attend to words at their places.

    A word's map is the mean of its tokens', widened by one pixel each way (3 x 3 maximum), enlarged to the latents and
    divided by its maximum.
    """
    found = []
    for maps_nhwN, own in zip(maps_RhwN.chunk(2), places, strict=True):
        for _, tokens in own:
            one_n1hw = maps_nhwN[..., tokens].mean(-1)[:, None]
            large = F.interpolate(F.max_pool2d(one_n1hw, 3, 1, 1), size, mode="bilinear", align_corners=False)
            found.append(large / large.amax((2, 3), keepdim=True).clamp(min=1e-12) > threshold)
    return torch.stack(found).any(0)


def _places(words: tuple[Words, Words], blend: tuple[str, ...] | None, kind: str) -> tuple[Places, Places]:
    """Of source and target: the blended words that it has. Raises ValueError for a word that neither has.

    Exchanged words are told by their place: of two red objects the one whose colour is another.
    """
    found: tuple[Places, Places] = ([], [])
    if blend is None and kind == "replace":
        for place, pair in enumerate(zip(words[0].words, words[1].words, strict=True)):
            if pair[0] != pair[1]:
                for own, side in zip(words, found, strict=True):
                    side.append((own.words[place], list(range(*own.spans[place]))))
    for phrase in blend or ():
        for own, side in zip(words, found, strict=True):
            try:
                side.append((phrase, own.tokens(phrase)))
            except ValueError:
                continue
        if phrase not in [name for side in found for name, _ in side]:
            words[1].find(phrase)
    return found


def _by_token(words: Words, value: float, by_word: Mapping[str, float]) -> Tensor:
    """(N,) float64: the value, or that of the word whose token it is."""
    values = torch.full((words.length,), value, dtype=torch.float64)
    for phrase, own in by_word.items():
        values[words.tokens(phrase)] = own
    return values


def _largest(session: Session) -> int:
    """Pixels of the largest map that attends."""
    sizes = session.parts.unet.attention_maps_px(*session.parts.latent_shape[1:])
    return max(height * width for height, width in sizes)


def _white(inside_n1hw: Tensor, size_px: tuple[int, int]) -> np.ndarray:
    large = F.interpolate(inside_n1hw.float(), size_px, mode="nearest")
    return (large * 255).byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
