"""The KL autoencoder's training, as in latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1 and G).

    L = L_rec + kl_weight * KL + adversarial,
    L_rec = mean |x - x'| + gradient_weight * mean |grad x - grad x'| + perceptual_weight * LPIPS(x, x'),
    KL = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2) per image

LPIPS needs a pretrained backbone, and the discriminator long training: both are off in the demo, where the L1 of the
images' gradients keeps outlines sharp. (Latent diffusion divides L_rec by a learned variance, which its code leaves
at 1.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raphael.base.randomness import SampleRng
from raphael.objectives.adversarial import AdversarialLoss
from raphael.objectives.perceptual import Lpips

IMAGE = "image"  # uint8 (B,H,W,3)


class AutoencodingObjective(nn.Module):
    """objective({"image": uint8 (B,H,W,3)}, rng) -> {"loss", "l1", "gradient", "kl", "psnr"}, scalars in float32; also
    "perceptual", and "generator", "discriminator", "adversarial_balance", where these are on.

    autoencoder: has encode_moments(images) -> raw moments, decode_raw(latents) -> images, and, for an adversarial
    loss, last_layer: the weight of its last convolution. crop_px: side of the
    square that is cut from each image, its place drawn from the rng; 0: whole images. Four crops of a quarter cost
    as much as one image and teach more, since a short training wants many different steps.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        kl_weight: float,
        gradient_weight: float,
        crop_px: int = 0,
        *,
        perceptual: Lpips | None = None,
        perceptual_weight: float = 1.0,
        adversarial: AdversarialLoss | None = None,
    ):
        super().__init__()
        self.autoencoder = autoencoder
        self.kl_weight, self.gradient_weight, self.crop_px = kl_weight, gradient_weight, crop_px
        self.perceptual, self.perceptual_weight, self.adversarial = perceptual, perceptual_weight, adversarial

    def forward(self, batch: dict[str, Tensor], rng: SampleRng) -> dict[str, Tensor]:
        images = to_network_range(self._crop(batch[IMAGE], rng))  # (B,3,H,W) in [-1,1]
        moments = self.autoencoder.encode_moments(images).float()  # (B,2C,h,w)
        mean, log_variance = moments.chunk(2, dim=1)
        noise = rng.normal("posterior", mean.shape[1:]).to(mean.device)  # (B,C,h,w)
        latents = mean + (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise
        reconstructions = self.autoencoder.decode_raw(latents).float()  # (B,3,H,W)
        l1 = (images - reconstructions).abs().mean()
        gradient = gradient_l1(images, reconstructions)
        kl = kl_divergence(moments).mean()
        reconstruction = l1 + self.gradient_weight * gradient
        facts = {"l1": l1, "gradient": gradient, "kl": kl}
        if self.perceptual is not None:
            facts["perceptual"] = self.perceptual(images, reconstructions).mean()
            reconstruction = reconstruction + self.perceptual_weight * facts["perceptual"]
        loss = reconstruction + self.kl_weight * kl
        if self.adversarial is not None:
            last = self.autoencoder.last_layer
            added, further = self.adversarial(images, reconstructions, reconstruction, last)
            loss, facts = loss + added, {**facts, **further}
        with torch.no_grad():
            error = (images - reconstructions.clamp(-1, 1)).square().mean(dim=(1, 2, 3))
            psnr = (10 * torch.log10(4.0 / error.clamp(min=1e-12))).mean()
        return {"loss": loss, **{name: value.detach() for name, value in facts.items()}, "psnr": psnr}

    def _crop(self, images: Tensor, rng: SampleRng) -> Tensor:
        height, width = images.shape[1:3]
        side = self.crop_px
        if not side or side >= min(height, width):
            return images
        tops, lefts = rng.integers("crop_top", height - side + 1), rng.integers("crop_left", width - side + 1)
        corners = zip(images, tops.tolist(), lefts.tolist(), strict=True)
        return torch.stack([image[top : top + side, left : left + side] for image, top, left in corners])


def to_network_range(images: Tensor) -> Tensor:
    """uint8 (B,H,W,3) -> float32 (B,3,H,W) in [-1,1]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 (B, H, W, 3)")
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) of each image, summed over its latent, in nats. (B,2C,h,w) -> (B,)"""
    mean, log_variance = moments.float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30.0, 20.0)
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(dim=(1, 2, 3))


def gradient_l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error of the forward differences along both axes: outlines count, not only areas. Scalar."""
    error = images - reconstructions
    return 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
