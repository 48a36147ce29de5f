"""A text transformer that is trained with the network it tells: what it computes, and where its gradient goes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.unet import CaptionConfig, PlainUNetConfig
from raphael.base.randomness import SampleRng
from raphael.base.records import PIXELS
from raphael.diffusion.noise import noise_of
from raphael.diffusion.prediction import Velocity
from raphael.net.captions.captioned import Captioned, of_ids
from raphael.net.captions.transformer import CaptionTransformer
from raphael.net.condition import Condition
from raphael.net.plain import PlainBlock
from raphael.objectives.plain import PlainDenoising

WIDTH, LENGTH = 16, 6
TEXT = CaptionConfig(vocabulary=9, layers=2, head_dim=8)
UNET = PlainUNetConfig(
    latent_channels=3,
    channels=(8, 16),
    res_blocks=1,
    attention_levels=(1,),
    joined_text=True,
    head_dim=8,
    norm_groups=4,
    context_dim=WIDTH,
    context_length=LENGTH,
    vector_dim=WIDTH,
)
IDS = torch.tensor([[1, 4, 2, 7, 7, 7], [1, 3, 5, 6, 2, 7]])
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()


def transformer() -> CaptionTransformer:
    torch.manual_seed(0)
    return CaptionTransformer(TEXT, LENGTH, WIDTH).double()


def network(**changes: object) -> Captioned:
    """In float64, without the zeros that a network begins with: nothing would flow through them."""
    torch.manual_seed(0)
    made = Captioned(dataclasses.replace(UNET, **changes), TEXT, PlainBlock).double()
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return made


def by_hand(text: CaptionTransformer, ids: list[int], real: list[bool]) -> torch.Tensor:
    """One caption, token by token and head by head."""
    rows = [
        text.tokens.weight[i] + text.places[n] if there else text.padding[n]
        for n, (i, there) in enumerate(zip(ids, real, strict=True))
    ]
    for layer in text.layers:
        normed = [layer.norm_attention(row) for row in rows]
        q, k, v = zip(*((layer.qkv.weight @ row).view(3, layer.num_heads, -1) for row in normed), strict=True)
        mixed = []
        for query in q:
            heads = []
            for head in range(layer.num_heads):
                scores = torch.stack([query[head] @ key[head] for key in k]) / math.sqrt(len(query[head]))
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(weight * value[head] for weight, value in zip(weights, v, strict=True)))
            mixed.append(layer.out(torch.cat(heads)))
        rows = [row + one for row, one in zip(rows, mixed, strict=True)]
        rows = [row + layer.forward_layer(layer.norm_forward(row)) for row in rows]
    return torch.stack([text.norm(row) for row in rows])


@torch.no_grad()
def test_it_is_a_pre_norm_transformer_in_which_every_place_reads_every_place() -> None:
    text = transformer()
    got = text(IDS, MASK)
    for row in range(2):
        torch.testing.assert_close(got[row], by_hand(text, IDS[row].tolist(), MASK[row].tolist()).to(got))


def test_what_stands_at_padding_changes_nothing_and_gets_no_gradient() -> None:
    text = transformer()
    other = torch.where(MASK, IDS, 8)
    assert torch.equal(text(IDS, MASK), text(other, MASK))
    text(IDS, MASK).square().sum().backward()
    seen = text.tokens.weight.grad.abs().sum(1) > 0
    assert seen.tolist() == [row in (1, 2, 3, 4, 5, 6) for row in range(9)], "7 stands at padding alone"
    # the learned vector of a place is read where some caption of the batch has padding there
    assert (text.padding.grad.abs().sum(1) > 0).tolist() == [False, False, False, True, True, True]
    assert (text.places.grad.abs().sum(1) > 0).tolist() == [True, True, True, True, True, False]


def test_a_caption_without_a_token_is_padding_alone() -> None:
    text, none = transformer(), torch.zeros(2, LENGTH, dtype=torch.bool)
    got = text(IDS, none)
    assert torch.equal(got[0], got[1])
    torch.testing.assert_close(got[0], by_hand(text, [0] * LENGTH, [False] * LENGTH).to(got))


def test_ids_that_are_not_known_share_one_vector() -> None:
    text = CaptionTransformer(dataclasses.replace(TEXT, vocabulary=4), 3, WIDTH, torch.tensor([5, 70, 49406]))
    assert text.rows_of(torch.tensor([[5, 49406, 70], [6, 49407, 0]])).tolist() == [[0, 2, 1], [3, 3, 3]]
    kept = CaptionTransformer(dataclasses.replace(TEXT, vocabulary=4), 3, WIDTH)
    kept.load_state_dict(text.state_dict())
    assert torch.equal(kept.known, text.known), "a checkpoint says which ids they are"
    with pytest.raises(ValueError, match="known: got 3 token ids, expected 8"):
        CaptionTransformer(TEXT, 3, WIDTH, torch.tensor([5, 70, 49406]))
    with pytest.raises(ValueError, match=r"ids: got shape \(2, 5\), expected \(B, 6\)"):
        transformer()(IDS[:, :5], MASK[:, :5])


@torch.no_grad()
def test_the_last_token_is_the_vector_and_all_tokens_are_the_context() -> None:
    whole = network().eval()
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3.0, 900.0])
    tokens = whole.text(IDS, MASK)
    got = whole(x, t, of_ids(IDS, MASK)).prediction
    assert torch.equal(got, whole.unet(x, t, Condition(tokens, vector=tokens[:, -1])).prediction)
    # neither is idle: without the vector, or with padding hidden from attention, it is another image
    assert not torch.allclose(got, whole.unet(x, t, Condition(tokens)).prediction)
    assert not torch.allclose(got, whole.unet(x, t, Condition(tokens, MASK, vector=tokens[:, -1])).prediction)


@pytest.mark.parametrize("way", ["vector", "attention", "both"])
def test_the_denoising_loss_reaches_the_text_network_and_is_zero_at_padding(way: str) -> None:
    whole = network()
    whole.register_forward_pre_hook(lambda _, given: (given[0].double(), *given[1:]))  # pixels come in float32
    with torch.no_grad():
        if way == "attention":
            whole.unet.vector_in.weight.zero_()
        if way == "vector":
            for block in whole.transformer_blocks():
                block.self_attention.kv.weight.zero_()
    noise = noise_of(DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", zero_terminal_snr=True))
    goal = PlainDenoising(whole, noise, Velocity(), lambda batch, dropped: of_ids(batch["ids"], batch["mask"]))
    rng = SampleRng(0, 0, range(2))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loss = goal({PIXELS: pixels, "ids": IDS, "mask": MASK}, rng)["loss"]
    loss.backward()
    tokens = whole.text.tokens.weight.grad
    assert (tokens[[1, 2, 3, 4, 5, 6]].abs().amax(1) > 1e-9).all() and not tokens[[0, 7, 8]].any()
    assert all(parameter.grad.abs().max() > 0 for parameter in whole.text.layers.parameters())


def test_a_batch_of_texts_is_read_once_while_sampling() -> None:
    whole, calls = network().eval(), []
    whole.text.register_forward_hook(lambda *_: calls.append(1))
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        plain = whole(x, t, of_ids(IDS, MASK)).prediction
        with whole.remembering():
            for _ in range(3):
                assert torch.equal(whole(x, t, of_ids(IDS.clone(), MASK)).prediction, plain)
            assert len(calls) == 2
            whole(x, t, of_ids(IDS, MASK & False))
            assert len(calls) == 3, "another batch is read anew"
        whole(x, t, of_ids(IDS, MASK))
    assert len(calls) == 4, "outside nothing is kept"
    with whole.remembering():
        whole(x, t, of_ids(IDS, MASK)).prediction.sum().backward()
    assert whole.text.tokens.weight.grad.any(), "with gradients nothing is taken from before"


def test_what_is_no_token_ids_is_refused() -> None:
    whole, x, t = network(), torch.zeros(2, 3, 8, 8, dtype=torch.float64), torch.zeros(2)
    for condition, got in ((Condition(), "none"), (Condition(torch.zeros(2, LENGTH, WIDTH)), "torch.float32")):
        with pytest.raises(ValueError, match=f"tokens: got {got}.*expected token ids, int64"):
            whole(x, t, condition)
    with pytest.raises(ValueError, match="vector_dim: got 8 with context_dim 16, expected one number"):
        network(vector_dim=8)
    assert (whole.config.context_dim, whole.config.vector_dim, whole.config.context_length) == (1, 0, LENGTH)
