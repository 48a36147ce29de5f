"""One attention over the map and the text, held against the formula, head by head, in float64."""

from __future__ import annotations

import pytest
import torch

from raphael.base.config.unet import PlainUNetConfig
from raphael.net.attention import JointAttention
from raphael.net.condition import AttentionHooks, Condition
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet


def test_pixels_read_each_other_and_the_real_tokens_by_one_softmax() -> None:
    torch.manual_seed(0)
    joint, h = JointAttention(8, 6, 4).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    context, mask = torch.randn(2, 3, 6, dtype=torch.float64), torch.tensor([[True] * 3, [True, False, False]])
    context[1, 1:] = float("nan")
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            found = joint(h, context, mask)
        for row in range(2):
            q, k, v = joint.qkv(h[row]).chunk(3, dim=-1)
            kt, vt = joint.kv(context[row][mask[row]]).chunk(2, dim=-1)
            keys, values, read = torch.cat([k, kt]), torch.cat([v, vt]), []
            for head in (slice(0, 4), slice(4, 8)):
                read.append(torch.softmax(q[:, head] @ keys[:, head].T / 2.0, dim=-1) @ values[:, head])
            torch.testing.assert_close(found[row], joint.out(torch.cat(read, dim=-1)), rtol=1e-10, atol=1e-10)


def test_a_network_with_it_reads_the_text_also_from_its_memory_and_refuses_hooks() -> None:
    sizes = {"channels": (8,), "res_blocks": 1, "attention_levels": (0,), "head_dim": 4, "norm_groups": 2}
    config = PlainUNetConfig(
        latent_channels=3, **sizes, context_dim=8, context_length=3, joined_text=True, text_pool=True
    )
    torch.manual_seed(0)
    net = UNet(config, PlainBlock).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    x, t, one = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 700.0]), Condition(torch.randn(2, 3, 8))
    with torch.no_grad():
        plain = net(x, t, one).prediction
        with net.remembering():
            torch.testing.assert_close(net(x, t, one).prediction, plain)
        assert (net(x, t, Condition(torch.randn(2, 3, 8))).prediction - plain).abs().max() > 1e-4
        with pytest.raises(ValueError, match="hooks: got some, expected none: with joined_text"):
            net(x, t, one.with_hooks(AttentionHooks(edit=lambda call, probabilities: probabilities)))
    with pytest.raises(ValueError, match="joined_text: got true, expected a context_dim"):
        PlainUNetConfig(latent_channels=3, **sizes, joined_text=True)
