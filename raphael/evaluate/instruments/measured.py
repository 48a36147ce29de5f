"""The instruments as metrics of the model that generated the images: the ceilings, the probe, knock-outs and the swap.

Each tells its facts under its own key; where it has nothing to ask, `absent` says why. Their work is cut into pieces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raphael.evaluate.metric import Found, Number
from raphael.evaluate.scenes.readings import read_plainly, reading_of
from raphael.evaluate.subject import Pieces, Subject

if TYPE_CHECKING:
    from raphael.evaluate.instruments.knockouts import Knockouts
    from raphael.evaluate.instruments.probe import Probing

INSTRUMENTS = ("ceiling", "probe", "knockouts", "swap")
COUNTS = {"ceiling": "num_probe", "probe": "num_probe", "knockouts": "num_knockout_images", "swap": "num_swaps"}


def ceiling(subject: Subject) -> Found:
    """The numbers of true images, as drawn and after the autoencoder (raphael/evaluate/scenes/breakdown.py)."""
    if not _count(subject, "ceiling"):
        return _none("ceiling")
    from raphael.evaluate.scenes.breakdown import ceiling as ceiling_of

    pieces = subject.computed("ceiling", CEILING)
    drawn, decoded = ([reading_of(told) for piece in pieces for told in piece[side]] for side in (0, 1))
    reached = ceiling_of(subject.scenes.entries(), drawn, decoded)
    return Found(facts={"ceiling": {"n": len(subject.scenes), **reached}})


def _ceiling_pieces(subject: Subject) -> int:
    from raphael.encoders.autoencoder import ENCODED_AT_ONCE

    return -(-len(subject.scenes) // ENCODED_AT_ONCE) if _count(subject, "ceiling") else 0


def _ceiling_piece(subject: Subject, number: int) -> list[list[Any]]:
    """What is read in some scenes, [as drawn, decoded]."""
    import torch

    from raphael.diffusion.sampling import decode_images
    from raphael.encoders.autoencoder import ENCODED_AT_ONCE
    from raphael.evaluate.instruments.probe import mean_latents

    pipeline, first = subject.pipeline, number * ENCODED_AT_ONCE
    drawn = subject.scenes.images[first : first + ENCODED_AT_ONCE]
    with torch.inference_mode():
        decoded = decode_images(pipeline.parts(), mean_latents(pipeline, drawn))
    return [read_plainly(drawn), read_plainly(decoded)]


CEILING = Pieces(_ceiling_pieces, _ceiling_piece)


def probe(subject: Subject) -> Found:
    if not _count(subject, "probe"):
        return _none("probe")
    from raphael.evaluate.instruments.probe import told

    return Found(facts={"probe": told(subject.computed("probe", PROBE), _asked(subject))})


def _asked(subject: Subject) -> Any:
    return subject.scenes.take(_count(subject, "probe"))


def _probing(subject: Subject) -> Probing:
    from raphael.evaluate.instruments.probe import Probing

    return subject.kept("probe", lambda: Probing(subject.pipeline, _asked(subject)))


def _probe_pieces(subject: Subject) -> int:
    from raphael.objectives.probe import passes

    return len(passes(_asked(subject))) if _count(subject, "probe") else 0


PROBE = Pieces(_probe_pieces, lambda subject, number: _probing(subject)(number))


def knockouts(subject: Subject) -> Found:
    if not _count(subject, "knockouts"):
        return _none("knockouts")
    return Found(facts={"knockouts": _knocked(subject).told(subject.computed("knockouts", KNOCKOUTS))})


def _knocked(subject: Subject) -> Knockouts:
    from raphael.evaluate.instruments import knockouts as ko

    def make() -> Knockouts:
        images = ko.images_of_scenes(subject.pipeline, subject.scenes, _count(subject, "knockouts"))
        return ko.Knockouts(subject.pipeline, images, every_block=ko.BY_BLOCK)

    return subject.kept("knockouts", make)


KNOCKOUTS = Pieces(
    lambda subject: len(_knocked(subject)) if _count(subject, "knockouts") else 0,
    lambda subject, number: _knocked(subject)(number),
)


def swap(subject: Subject) -> Found:
    if not _count(subject, "swap"):
        return _none("swap")
    found = subject.computed("swap", SWAP)
    return Found(facts={"swap": found[0] if found else None})


def _pairs(subject: Subject) -> list[Any]:
    from raphael.evaluate.instruments.swap import pairs_of

    return pairs_of(subject.scenes.entries(), _count(subject, "swap"))


def _swapped(subject: Subject, number: int) -> dict[str, Any]:
    from raphael.evaluate.instruments.swap import swap as swap_of

    return swap_of(subject.pipeline, _pairs(subject))


# one batch, since an image's last bits depend on the size of its batch
SWAP = Pieces(lambda subject: int(bool(_count(subject, "swap") and _pairs(subject))), _swapped)


def timestep_loss(subject: Subject) -> Found:
    """The mean over timesteps with its interval over images; beside it the loss at each timestep."""
    from raphael.evaluate.instruments import timestep_loss as by_timestep
    from raphael.evaluate.metrics.intervals import bootstrap_mean

    pipeline = subject.pipeline
    images, texts = by_timestep.chosen(pipeline, subject.scenes)
    with subject.progress(len(images) * by_timestep.BINS, "losses") as bar:
        losses = by_timestep.timestep_losses(pipeline, images, texts, advance=bar.update)
    by_image = losses.double().mean(1).tolist()
    low, high = bootstrap_mean(by_image) if len(by_image) > 1 else (None, None)
    facts = by_timestep.told(losses, by_timestep.timesteps(pipeline))
    number = Number("timestep_loss", float(sum(by_image) / len(by_image)), pipeline.identity, low, high)
    return Found([number], {"timestep_losses": facts})


def _count(subject: Subject, name: str) -> int:
    return subject.counts().get(COUNTS[name], 0)


def _none(name: str) -> Found:
    return Found(facts={name: None}, absent={name: f"evaluate.{COUNTS[name]} is 0"})


def tracked(facts: dict[str, Any]) -> dict[str, float]:
    """The instruments' numbers under their keys in MLflow, behind evaluate/."""
    numbers: dict[str, float] = {}
    for fact, row in (facts.get("probe") or {}).get("facts", {}).items():
        numbers[f"probe/{fact}"] = row["win_share"]
    for row in (facts.get("knockouts") or {}).get("parts", ()):
        if row["block"] is None:
            numbers[f"knockouts/{row['part']}"] = row["cost"]
    for fact, row in (facts.get("swap") or {}).get("facts", {}).items():
        numbers |= {f"swap/{fact}_{name}": row[name] for name in ("pooled", "attention")}
    if by_timestep := facts.get("timestep_losses"):
        pairs = zip(by_timestep["timesteps"], by_timestep["losses"], strict=True)
        numbers |= {f"timestep_loss/t{timestep:04d}": loss for timestep, loss in pairs}
    parts = {"relation_parts": facts.get("relation_parts") or {}}
    for images in ("drawn", "decoded"):
        reached = (facts.get("ceiling") or {}).get(images, {})
        parts[f"ceiling/{images}"] = {key: value for key, value in reached.items() if key.endswith("_accuracy")}
    for name, rows in parts.items():
        ends = ("_n", "_low", "_high")
        numbers |= {f"{name}/{key}": v for key, v in rows.items() if v is not None and not key.endswith(ends)}
    return numbers
