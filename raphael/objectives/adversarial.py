"""The patch discriminator that sharpens an autoencoder's images (Esser et al. 2021, arXiv 2012.09841, eq. 6 and 7).

    discriminator   L_D = 1/2 E[ max(0, 1 - D(x)) + max(0, 1 + D(x')) ]        (hinge)
    autoencoder     lambda L_G,  L_G = -E[ D(x') ],  lambda = weight |grad_w L_rec| / (|grad_w L_G| + 1e-4), at most 1e4

w: the weight of the decoder's last layer, so that neither loss drowns the other. Both sides are trained by one step
of one optimizer: each sees the other as it was before the step (the paper's code takes turns on a batch).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

LARGEST = 1e4


class PatchDiscriminator(nn.Module):
    """pix2pix's (arXiv 1611.07004): images (B, 3, H, W) in [-1, 1] -> scores (B, 1, h, w), one for each patch.

    `layers` convolutions of stride 2; each score sees 70 x 70 px with three. Group norms in the place of batch norms:
    an image's score must not depend on its neighbours in the batch, nor on the number of workers.
    Raises ValueError for images that leave no patch: sides below 3 * 2^layers.
    """

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.smallest_px = 3 * 2**layers
        body: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for number in range(1, layers + 1):
            wider = channels * min(2**number, 8)
            stride = 2 if number < layers else 1
            body += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(min(32, wider), wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.net = nn.Sequential(*body, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.smallest_px:
            got = " x ".join(map(str, images.shape[2:]))
            raise ValueError(
                f"the discriminator: got images or crops of {got} px, expected sides of at least {self.smallest_px}; "
                "raise autoencoder.crop_px or lower autoencoder.adversarial.layers"
            )
        return self.net(images)


class AdversarialLoss(nn.Module):
    """The two losses above, from `start_images` on; before, the discriminator neither learns nor teaches.

    weight: of the generator's loss at equal gradients. The count of images is a buffer, saved with the weights.
    """

    images_seen: Tensor

    def __init__(self, weight: float, start_images: int, channels: int = 64, layers: int = 3):
        super().__init__()
        self.weight, self.start_images = weight, start_images
        self.discriminator = PatchDiscriminator(channels, layers)
        self.register_buffer("images_seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, images: Tensor, reconstructions: Tensor, rest: Tensor, last: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """images, reconstructions (B, 3, H, W); rest: the autoencoder's other losses, a scalar; last: weight of the
        decoder's last layer -> (what is added to the loss, statistics by name: scalars).

        lambda is of the global batch: with several workers their gradients are averaged first.
        """
        on = (self.images_seen >= self.start_images).float()
        if self.training:
            self.images_seen += len(images) * _workers()
        frozen = {name: value.detach() for name, value in self.discriminator.state_dict(keep_vars=True).items()}
        generator = -functional_call(self.discriminator, frozen, (reconstructions,)).float().mean()
        real, drawn = self.discriminator(images.detach()), self.discriminator(reconstructions.detach())
        judged = 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + drawn.float()).mean())
        balance = self._balance(rest, generator, last) * on
        facts = {"generator": generator, "discriminator": judged, "adversarial_balance": balance}
        return balance * generator + on * judged, {name: value.detach() for name, value in facts.items()}

    def _balance(self, rest: Tensor, generator: Tensor, last: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return rest.new_tensor(self.weight)
        norms = [_mean(torch.autograd.grad(loss, last, retain_graph=True)[0]).norm() for loss in (rest, generator)]
        return (self.weight * norms[0] / (norms[1] + 1e-4)).clamp(max=LARGEST).detach()


def _workers() -> int:
    return torch.distributed.get_world_size() if _several() else 1


def _mean(gradient: Tensor) -> Tensor:
    """Over the workers."""
    gradient = gradient.float()
    if _several():
        torch.distributed.all_reduce(gradient)
    return gradient / _workers()


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
