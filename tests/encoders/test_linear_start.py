import dataclasses

import pytest
import torch

from raphael.base.config.params import load_config
from raphael.encoders.autoencoder import build_autoencoder, psnr


def blocks(side=32, cell=4):
    """Pictures that a latent cell per 4 x 4 pixels can hold: colours constant in each cell, smooth between."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 3, 3, generator=generator) * 2 - 1
    cells = torch.nn.functional.interpolate(coarse, size=side // cell, mode="bilinear", align_corners=True)
    return cells.repeat_interleave(cell, 2).repeat_interleave(cell, 3)


@pytest.mark.parametrize(("channels", "groups"), [((16, 32, 64), 2), ((8, 16, 16), 1), ((32, 64, 64), 4)])
def test_an_untrained_autoencoder_already_carries_the_colours(project, channels, groups):
    config = load_config(project / "params.yaml").autoencoder
    torch.manual_seed(0)
    autoencoder = build_autoencoder(dataclasses.replace(config, channels=channels, norm_groups=groups)).eval()
    images = blocks()
    with torch.no_grad():
        moments = autoencoder.encode_moments(images)
        mean, log_variance = moments.chunk(2, dim=1)
        restored = autoencoder.decode_raw(mean)
    assert psnr(images, restored).mean() > 16  # from random weights: below 8
    assert (0.5 * log_variance).exp().mean() < 0.2


def test_what_is_not_carried_stays_random_and_everything_learns(project):
    config = load_config(project / "params.yaml").autoencoder
    autoencoder = build_autoencoder(dataclasses.replace(config, channels=(16, 16), norm_groups=2))
    images = blocks()
    mean, log_variance = autoencoder.encode_moments(images).chunk(2, dim=1)
    (autoencoder.decode_raw(mean + log_variance) - images).square().mean().backward()
    still = [name for name, parameter in autoencoder.named_parameters() if parameter.grad is None]
    assert not still


def test_a_network_too_narrow_to_carry_them_is_refused(project):
    config = load_config(project / "params.yaml").autoencoder
    with pytest.raises(ValueError, match="expected at least 8 and 3"):
        build_autoencoder(dataclasses.replace(config, channels=(4, 8), norm_groups=2))
