"""Half a U-Net is the first half of one, and its pooling is attention written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from raphael.base.config.guide import HalfUNetConfig
from raphael.base.config.unet import PlainUNetConfig
from raphael.net.condition import Condition
from raphael.net.noised.half import AttentionPool, HalfUNet
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet

SIZES = {"latent_channels": 3, "channels": (8, 16, 16), "res_blocks": 2, "attention_levels": (1,), "head_dim": 8}
SIZES |= {"norm_groups": 4, "expansion": 2.0, "patch_px": 2}


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, none zero."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
    return module.double().eval()


def half(**changes) -> HalfUNet:
    return filled(HalfUNet(HalfUNetConfig(**{**SIZES, "embedding_dim": 5, "pool_side": 2, **changes})))


def test_what_it_pools_is_the_middle_of_a_u_net_with_the_same_weights():
    mine, whole = half(), filled(UNet(PlainUNetConfig(**SIZES), PlainBlock), 1)
    blocks = iter(mine.down)
    for unit in whole.down:
        for module in unit if isinstance(unit, torch.nn.ModuleList) else [unit]:
            module.load_state_dict(next(blocks).state_dict())
    assert next(blocks, None) is None
    for name in ("time_embedding", "conv_in", "middle_in", "middle", "middle_out"):
        getattr(whole, name).load_state_dict(getattr(mine, name).state_dict())
    seen = {}
    whole.middle_out.register_forward_hook(lambda module, given, out: seen.update(whole=out))
    mine.middle_out.register_forward_hook(lambda module, given, out: seen.update(mine=out))
    x, t = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([3.0, 250.5, 999.0])
    whole(x, t, Condition())
    mine(x, t)
    torch.testing.assert_close(seen["mine"], seen["whole"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(2, 2), (3, 4)])
def test_pooling_equals_a_loop_over_samples_and_heads(size):
    pool, h = filled(AttentionPool(16, 5, 8, 2)), torch.randn(3, 16, *size, dtype=torch.float64)
    places = pool.places if size == (2, 2) else F.interpolate(pool.places[None], size, mode="bilinear")[0]
    expected = []
    for sample in h:
        mean = sample.mean((1, 2)) + pool.mean_place
        tokens = [mean, *((sample + places)[:, y, x] for y in range(size[0]) for x in range(size[1]))]
        query, joined = pool.q(mean), []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            keys = [pool.kv(token)[:16][part] for token in tokens]
            values = [pool.kv(token)[16:][part] for token in tokens]
            weights = torch.stack([query[part] @ key / 8**0.5 for key in keys]).softmax(0)
            joined.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        expected.append(pool.out(torch.cat(joined)))
    torch.testing.assert_close(pool(h), torch.stack(expected), rtol=0, atol=1e-12)
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(pool(h), torch.stack(expected), rtol=0, atol=1e-12)


def test_samples_do_not_see_each_other_and_a_nan_stays_with_its_own():
    network, x = half(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    t = torch.tensor([3.0, 250.5, 999.0])
    spoilt = x.clone()
    spoilt[1, 0, 0, 0] = torch.nan
    found = network(spoilt, t)
    assert bool(found[1].isnan().all())
    for row in (0, 2):
        torch.testing.assert_close(found[row], network(x[row : row + 1], t[row : row + 1])[0], rtol=0, atol=1e-12)


def test_what_it_cannot_read_is_named():
    network = half()
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4, 16, 16\), expected \(B, 3, h, w\).*multiples of 8"):
        network(torch.zeros(2, 4, 16, 16).double(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"t: got shape \(1,\), expected \(B,\) = \(2,\)"):
        network(torch.zeros(2, 3, 16, 16).double(), torch.zeros(1))
    with pytest.raises(ValueError, match="context_dim: got 8, expected none"):
        HalfUNetConfig(**SIZES, context_dim=8, context_length=4)
