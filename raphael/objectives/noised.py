"""What guides learn: to tell a class, or the caption, of a noised image at any timestep.

Classifier: cross-entropy of the label given (x_t, t) (Dhariwal and Nichol, arXiv 2105.05233, section 4). CLIP: the
contrastive loss of (x_t, t) and its caption (GLIDE, arXiv 2112.10741, section 2.4), here with a frozen text tower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raphael.base.randomness import SampleRng
from raphael.base.records import LABEL, NO_LABEL, TOKEN_IDS
from raphael.diffusion.cascade import shrunk
from raphael.diffusion.schedule import Noise
from raphael.net.latents import moments_of, sample_latents
from raphael.objectives.contrastive import MAX_LOG_SCALE, contrastive_loss
from raphael.objectives.timesteps import QUARTERS, shifted

FIRST_SCALE = 1 / 0.07  # of a CLIP's logits, at the start (arXiv 2103.00020, section 2.5)


class _Noised(nn.Module):
    """network: of (x_t (B, C, h, w), t (B,)) -> (B, D). scale: (factor, shift) of latents, (mean - shift) * factor;
    (1, 0) of pixels. shift: where in time it is trained (`shifted`), 1: everywhere alike. shrink: side of the records'
    images / side of what is noised, means of areas: of what a cascade's first network draws."""

    def __init__(
        self,
        network: nn.Module,
        noise: Noise,
        scale: tuple[float, float] = (1.0, 0.0),
        shift: float = 1.0,
        shrink: int = 1,
    ):
        super().__init__()
        self.network, self.noise, self.scale, self.shift, self.shrink = network, noise, scale, shift, shrink

    def embed(self, batch: Mapping[str, Tensor], rng: SampleRng, places: Tensor) -> tuple[Tensor, Tensor]:
        """(what the network says (B, D) float32, the timesteps t (B,)) of a batch noised at the shares `places` (B,) of
        the timesteps, in [0, 1)."""
        x0 = shrunk(sample_latents(moments_of(batch), *self.scale), self.shrink)
        t = self.noise.timesteps(places).to(x0.device)
        eps = rng.normal("noise", tuple(x0.shape[1:])).to(x0.device)
        return self.network(self.noise.add_noise(x0, eps, t), t).float(), t

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        """Returns "loss", "accuracy" and, detached, "accuracy_t": that in each quarter of the timesteps."""
        found, t = self.embed(batch, rng, shifted(rng.uniform("timestep"), self.shift))
        loss, hits, known, told = self.judge(found, batch)
        inside = F.one_hot((QUARTERS * t // self.noise.num_steps).long(), QUARTERS).float() * known[:, None]  # (B, 4)
        return {
            "loss": loss,
            "accuracy": (hits * known).mean(),
            "accuracy.share": known.mean(),
            "accuracy_t": (hits[:, None] * inside).mean(0),
            "accuracy_t.share": inside.mean(0),
            **told,
        }

    @torch.no_grad()
    def hits(self, batch: Mapping[str, Tensor], rng: SampleRng, place: float) -> tuple[Tensor, Tensor]:
        """(hits, known), (B,) of 0 and 1: which samples it tells right at that share of the timesteps, and which count:
        those that have a label."""
        found, _ = self.embed(batch, rng, torch.full((len(rng),), place))
        _, hits, known, _ = self.judge(found, batch)
        return hits, known

    def judge(self, found: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """(loss (), hits (B,), known (B,), further statistics) of what the network says, found (B, D)."""
        raise NotImplementedError


class NoisedClassifier(_Noised):
    """batch: moments or pixels, and label (B,). Samples without a label are no part of the loss: its sum over the
    others is divided by the batch, so that it is a mean over any split of it."""

    def judge(self, found: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        labels = batch[LABEL].long()
        known = (labels != NO_LABEL).float()
        losses = F.cross_entropy(found, labels.clamp(min=0), reduction="none")
        hits = (found.argmax(1) == labels).float()
        return (losses * known).mean(), hits, known, {}


class NoisedClip(_Noised):
    """batch: moments or pixels, and token_ids (B, N). A hit: of the batch's captions its own is the nearest.

    encode_text: token ids (B, N) int64 -> (B, D), frozen. log_scale: of the logits, learned, at most log 100. Trained
    in one process, as `ContrastiveObjective` is.
    """

    def __init__(
        self,
        network: nn.Module,
        noise: Noise,
        encode_text: Callable[[Tensor], Tensor],
        scale: tuple[float, float] = (1.0, 0.0),
        shift: float = 1.0,
        shrink: int = 1,
    ):
        super().__init__(network, noise, scale, shift, shrink)
        self.encode_text = encode_text
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def judge(self, found: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            texts = self.encode_text(batch[TOKEN_IDS].long()).float()
        loss, _ = contrastive_loss(found, texts, self.log_scale)
        cosines = F.normalize(found, dim=-1) @ F.normalize(texts, dim=-1).T
        own = cosines.diagonal()[:, None]
        hits = (cosines <= own).all(1).float().detach()  # two equal captions in a batch are both right
        scale = self.log_scale.detach().clamp(max=MAX_LOG_SCALE).exp()
        return loss, hits, torch.ones_like(hits), {"scale": scale}


def class_log_p(logits: Tensor, classes: Tensor) -> Tensor:
    """logits (B, K), classes (B,) -> log p(class | x_t, t) (B,)."""
    return F.log_softmax(logits, dim=1).gather(1, classes[:, None])[:, 0]


def text_log_p(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """scale * cosine (B,) of images and texts (B, D): log p but for a constant that a caption's gradient lacks."""
    return scale * (F.normalize(images, dim=-1) * F.normalize(texts, dim=-1)).sum(1)
