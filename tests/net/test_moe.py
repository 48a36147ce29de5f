import pytest
import torch
from truth import moe_loops

from raphael.net.moe import Routing, SpaceMoE, TimeMoE, region_mask

B, P, N, D, C, K = 2, 12, 7, 8, 10, 3


def space_inputs(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    h = draw(B, P, D).requires_grad_()
    context = draw(B, N, C).requires_grad_()
    attention = torch.softmax(3 * draw(B, P, N), dim=-1)
    return h, context, attention


def space_moe(**changes):
    torch.manual_seed(1)
    moe = SpaceMoE(D, C, K, **{"expansion": 2, "mask_threshold": 0.5, **changes}).double().eval()
    with torch.no_grad():  # biases away from zero, else e_k(0) = 0 and half of the identity is not tested
        for parameter in moe.experts.parameters():
            parameter.normal_()
    return moe


def gradients(out, inputs):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate_gradient", ["straight_through", "none"])
def test_space_moe_equals_the_token_loop_in_value_and_in_every_gradient(masked, gate_gradient):
    moe = space_moe(gate_gradient=gate_gradient)
    h, context, attention = space_inputs()
    mask = torch.arange(N) < torch.tensor([[4], [7]]) if masked else None
    fast, routing = moe(h, context, attention, mask)
    slow = moe_loops.space_moe(moe, h, context, attention, mask)
    assert len(routing.expert.unique()) > 1
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    inputs = [h, context, *moe.parameters()]
    for mine, true in zip(gradients(fast, inputs), gradients(slow, inputs), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


def test_the_straight_through_gate_changes_no_value_and_gives_the_gate_a_gradient():
    h, context, attention = space_inputs()
    literal, through = space_moe(gate_gradient="none"), space_moe()
    out_literal, _ = literal(h, context, attention)
    out_through, _ = through(h, context, attention)
    assert torch.equal(out_literal, out_through)
    assert all((g == 0).all() for g in gradients(out_literal, list(literal.gate.parameters())))
    assert any((g != 0).any() for g in gradients(out_through, list(through.gate.parameters())))


def test_the_gate_weight_stays_one_where_the_probability_underflows():
    moe = space_moe()
    with torch.no_grad():
        moe.gate.net[2].bias.copy_(torch.tensor([0.0, 400.0, -400.0]))
    expert, _, weight = moe.gate(torch.randn(1, 5, C, dtype=torch.float64))
    assert (expert == 1).all() and torch.equal(weight, torch.ones_like(weight))
    assert all(g.isfinite().all() for g in gradients(weight, list(moe.gate.parameters())))


def test_an_expert_nobody_chose_gets_a_gradient_of_exactly_zero():
    moe = space_moe()
    with torch.no_grad():
        moe.gate.net[2].bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    h, context, attention = space_inputs()
    out, routing = moe(h, context, attention)
    assert routing.load().tolist() == [1, 0, 0]
    out.square().sum().backward()
    for parameter in moe.experts.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert (parameter.grad[1:] == 0).all()


def test_a_token_without_attention_adds_the_expert_at_zero():
    moe = space_moe()
    h, context, attention = space_inputs()
    nowhere = torch.zeros_like(attention)
    assert not region_mask(nowhere, 0.2).any()
    out, routing = moe(h, context, nowhere)
    at_zero = moe.experts.at_zero()[routing.expert].mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, at_zero, rtol=0, atol=1e-12)


def test_cover_counts_the_experts_that_a_pixel_needs():
    moe = space_moe(mask_threshold=0.0)
    h, context, attention = space_inputs()
    _, routing = moe(h, context, attention)
    used = torch.tensor([len(row.unique()) for row in routing.expert]).float()
    assert torch.equal(routing.cover, used)  # with full masks every used expert is needed everywhere


def test_gate_noise_acts_in_training_only():
    moe = space_moe(gate_noise=100.0)
    h, context, attention = space_inputs()
    quiet, _ = moe(h, context, attention)
    moe.train()
    noise = torch.randn(B, N, K, generator=torch.Generator().manual_seed(3))
    noisy, routing = moe(h, context, attention, noise=noise)
    assert torch.equal(routing.expert, noise.argmax(-1))  # noise of 100 decides alone
    assert not torch.allclose(noisy, quiet)
    assert torch.equal(moe.eval()(h, context, attention, noise=noise)[0], quiet)


def test_time_moe_equals_the_loop_over_samples_in_value_and_in_every_gradient():
    torch.manual_seed(2)
    moe = TimeMoE(D, C, K, expansion=2, gate_hidden=2.0).double().eval()
    h = torch.randn(6, P, D, dtype=torch.float64, requires_grad=True)
    time = 3 * torch.randn(6, C, dtype=torch.float64)
    fast, routing = moe(h, time)
    slow = moe_loops.time_moe(moe, h, time)
    assert len(routing.expert.unique()) > 1
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    inputs = [h, *moe.parameters()]
    for mine, true in zip(gradients(fast, inputs), gradients(slow, inputs), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


def test_time_experts_that_no_sample_chose_have_a_zero_gradient_and_not_none():
    moe = TimeMoE(D, C, K).eval()
    with torch.no_grad():
        moe.gate.net[2].bias.copy_(torch.tensor([0.0, 0.0, 100.0]))
    out, routing = moe(torch.randn(4, P, D), torch.randn(4, C))
    assert routing.load().tolist() == [0, 0, 1]
    out.sum().backward()
    assert moe.experts.w1.grad is not None
    assert (moe.experts.w1.grad[:2] == 0).all() and moe.experts.w1.grad[2].abs().sum() > 0


def test_the_balance_loss_is_one_when_balanced_and_k_when_everything_goes_one_way():
    chosen = torch.ones(1, 6, dtype=torch.bool)
    even = Routing(torch.arange(6)[None] % 3, torch.full((1, 6, 3), 1 / 3), chosen)
    torch.testing.assert_close(even.balance_loss(), torch.ones(1))
    one = torch.zeros(1, 6, 3)
    one[..., 0] = 1
    skewed = Routing(torch.zeros(1, 6, dtype=torch.long), one, chosen)
    torch.testing.assert_close(skewed.balance_loss(), torch.tensor([3.0]))


def test_shapes_that_do_not_fit_are_refused_with_what_was_expected():
    moe = space_moe()
    h, context, attention = space_inputs()
    with pytest.raises(ValueError, match=r"attention: got shape \(2, 7, 12\), expected \(B, P, N\) = \(2, 12, 7\)"):
        moe(h, context, attention.mT)
    with pytest.raises(ValueError, match="context_mask: got shape"):
        moe(h, context, attention, torch.ones(B, N + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_experts: got 0"):
        SpaceMoE(D, C, 0)
