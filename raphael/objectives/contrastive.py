"""CLIP's training (Radford et al. 2021, figure 3): in a batch of pairs, images and texts find each other.

logits = exp(s) * I T^T with unit rows, s learned and exp(s) <= 100; the loss is the mean of the two cross-entropies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raphael.base.randomness import SampleRng

IMAGE = "image"  # uint8 (B,H,W,3), already of the tower's side
TOKEN_IDS = "token_ids"  # whole numbers (B,N)
MAX_LOG_SCALE = math.log(100.0)


class ContrastiveObjective(nn.Module):
    """objective({"image", "token_ids"}, rng) -> {"loss", "accuracy", "scale"}, scalars. Nothing in it is random.

    clip: has encode_image, encode_text and the scalar parameter logit_scale (a logarithm), like open_clip's CLIP.
    mean, std: of RGB in [0,1], see raphael/encoders/clip.py. Trained in one process: the pairs of other workers' slices
    would have to be gathered, which this does not do.
    """

    def __init__(self, clip: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        pixels = (batch[IMAGE].permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std  # (B,3,H,W)
        images = self.clip.encode_image(pixels)  # (B,D)
        texts = self.clip.encode_text(batch[TOKEN_IDS].long())  # (B,D)
        loss, accuracy = contrastive_loss(images.float(), texts.float(), self.clip.logit_scale.float())
        scale = self.clip.logit_scale.detach().clamp(max=MAX_LOG_SCALE).exp()
        return {"loss": loss, "accuracy": accuracy, "scale": scale}


def contrastive_loss(images: Tensor, texts: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, share of images and texts whose best match is their own); scalars. images, texts (B,D), of any norm."""
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(f"embeddings: got {tuple(images.shape)} and {tuple(texts.shape)}, expected two of (B, D)")
    # Beyond the bound the gradient of log_scale is 0, so it stays there instead of growing without end.
    logits = log_scale.clamp(max=MAX_LOG_SCALE).exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    own = torch.arange(len(logits), device=logits.device)
    loss = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    with torch.no_grad():
        hits = (logits.argmax(dim=0) == own).float().mean() + (logits.argmax(dim=1) == own).float().mean()
    return loss, 0.5 * hits


@torch.no_grad()
def retrieval(images: Tensor, texts: Tensor, group: int) -> dict[str, float]:
    """In groups of `group` pairs: how often an image's nearest text is its own, a text's nearest image, and chance.

    images, texts: unit rows (n,D), row i of both one pair. A last, smaller group is left out unless it is the only one.
    """
    count = len(images)
    group = min(group, count)
    starts = range(0, count - group + 1, group)
    hits_image = hits_text = 0
    for start in starts:
        similarity = images[start : start + group] @ texts[start : start + group].T
        own = torch.arange(group, device=similarity.device)
        hits_image += int((similarity.argmax(dim=1) == own).sum())
        hits_text += int((similarity.argmax(dim=0) == own).sum())
    seen = group * len(starts)
    return {"image_to_text": hits_image / seen, "text_to_image": hits_text / seen, "chance": 1 / group, "pairs": seen}
