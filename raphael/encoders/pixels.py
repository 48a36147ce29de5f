"""Latents that are the image: for systems that diffuse pixels. Nothing is learned and nothing is lost.

It stands where an autoencoder stands, so that records, training, generation and reports know no second way. An image in
[-1, 1] is its own mean, its scale is 1; a record of pixels is read by `raphael.net.latents.moments_of` to the same
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PixelNetwork(nn.Module):
    """encode, decode: images (B,3,H,W) in [-1,1], as they are."""

    latent_channels, downsampling = 3, 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)  # knows the device, as weights would

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents
