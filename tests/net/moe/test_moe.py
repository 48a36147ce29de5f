import pytest
import torch
from truth import moe_loops

from raphael.net.moe.mixtures import Routing, SpaceMoE, TimeMoE, region_mask

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


def test_at_a_threshold_of_one_the_brightest_pixel_stays_and_no_other():
    attention = space_inputs()[2]
    peak = attention == attention.amax(dim=1, keepdim=True)
    assert torch.equal(region_mask(attention, 1.0), peak) and (peak.sum(1) == 1).all()


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


def test_both_mixtures_work_by_their_widths_alone_and_with_the_papers_numbers():
    space, time = SpaceMoE(D, C, 6).eval(), TimeMoE(D, C, 4).eval()
    assert space.mask_threshold == 0.2 and space.experts.w1.shape == (6, 4 * D, D)
    h = torch.randn(B, P, D)
    out, routing = space(h, torch.randn(B, N, C), torch.rand(B, P, N))
    assert out.shape == (B, P, D) and routing.expert.shape == (B, N) and routing.probability.shape == (B, N, 6)
    assert routing.load().shape == (6,) and routing.cover.shape == (B,)
    out, routing = time(h, torch.randn(B, C))
    assert out.shape == (B, P, D) and routing.expert.shape == (B,) and routing.probability.shape == (B, 4)


def test_the_divisor_is_the_number_of_tokens_or_of_those_that_the_mask_keeps():
    moe = space_moe()
    h, context, _ = space_inputs()
    everywhere = torch.ones(B, P, N, dtype=torch.float64)
    with torch.no_grad():  # one expert for all tokens: the mean is its value, whatever it is divided by
        moe.gate.net[2].bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
        w1, b1, w2, b2 = moe.experts.experts()[0]
        value = moe_loops.gelu(h @ w1.T + b1) @ w2.T + b2
        for mask in (None, torch.arange(N) < torch.tensor([[3], [5]])):
            torch.testing.assert_close(moe(h, context, everywhere, mask)[0], value, rtol=0, atol=1e-12)


def test_a_sample_whose_tokens_are_all_masked_gets_a_term_of_zero():
    moe = space_moe()
    h, context, attention = space_inputs()
    mask = torch.tensor([[False], [True]]).expand(B, N)
    out, routing = moe(h, context, attention, mask)
    assert (out[0] == 0).all() and (out[1] != 0).any()
    assert routing.load().sum() == 1 and routing.cover[0] == 0


def test_a_token_without_attention_that_is_masked_adds_nothing():
    moe = space_moe()
    h, context, attention = space_inputs()
    attention[:, :, 2] = 0
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[:, 2] = False
    rest = [i for i in range(N) if i != 2]
    expected, _ = moe(h, context[:, rest], attention[:, :, rest])
    torch.testing.assert_close(moe(h, context, attention, mask)[0], expected, rtol=0, atol=1e-12)


def test_the_balance_bias_moves_choices_and_nothing_else():
    moe = space_moe()
    h, context, attention = space_inputs()
    _, plain = moe(h, context, attention)
    assert len(plain.expert.unique()) > 1
    moe.gate.balance_bias.copy_(torch.tensor([0.0, 2.0, 0.0]))  # above any probability
    out, routing = moe(h, context, attention)
    assert (routing.expert == 1).all() and torch.equal(routing.probability, plain.probability)
    assert torch.equal(moe.gate.route(context), routing.expert)
    weight = [parameter for name, parameter in moe.named_parameters() if "gate" in name]
    assert any((g != 0).any() for g in gradients(out, weight))
    assert "gate.balance_bias" in moe.state_dict()


def test_rebalancing_lowers_the_bias_of_what_is_chosen_too_often_by_the_rate():
    gate = space_moe().gate
    gate.rebalance(torch.tensor([9.0, 0.0, 3.0]), 0.01)
    torch.testing.assert_close(gate.balance_bias, torch.tensor([-0.01, 0.01, 0.01], dtype=torch.float64))
    gate.rebalance(torch.tensor([4.0, 4.0, 4.0]), 0.01)
    torch.testing.assert_close(gate.balance_bias, torch.tensor([-0.01, 0.01, 0.01], dtype=torch.float64))


def test_shapes_that_do_not_fit_are_refused_with_what_was_expected():
    moe = space_moe()
    h, context, attention = space_inputs()
    with pytest.raises(ValueError, match=r"attention: got shape \(2, 7, 12\), expected \(B, P, N\) = \(2, 12, 7\)"):
        moe(h, context, attention.mT)
    with pytest.raises(ValueError, match="context_mask: got shape"):
        moe(h, context, attention, torch.ones(B, N + 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_experts: got 0"):
        SpaceMoE(D, C, 0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("h", lambda t: t[..., :5], r"h: got shape \(2, 12, 5\), expected \(B, P, D\) = \(B, P, 8\)"),
        ("h", lambda t: t[0], r"h: got shape \(12, 8\)"),
        ("context", lambda t: t[..., :4], r"context: got shape \(2, 7, 4\), expected \(B, N, C\) = \(2, N, 10\)"),
        ("context", lambda t: t[:1], r"context: got shape \(1, 7, 10\)"),
        ("context_mask", lambda t: torch.ones(B, N), "context_mask: got torch.float32, expected torch.bool"),
        ("noise", lambda t: torch.ones(B, N), r"noise: got shape \(2, 7\), expected \(2, 7, 3\)"),
    ],
)
def test_space_moe_names_the_input_that_does_not_fit(name, change, message):
    h, context, attention = space_inputs()
    given = {"h": h, "context": context, "attention": attention, "context_mask": None, "noise": None}
    with pytest.raises(ValueError, match=message):
        space_moe()(**{**given, name: change(given[name])})


def test_time_moe_names_the_input_that_does_not_fit():
    moe = TimeMoE(D, C, K)
    with pytest.raises(ValueError, match=r"h: got shape \(2, 12, 9\), expected \(B, P, D\) = \(B, P, 8\)"):
        moe(torch.zeros(2, 12, 9), torch.zeros(2, C))
    with pytest.raises(ValueError, match=r"time_embedding: got shape \(3, 10\), expected \(B, C\) = \(2, 10\)"):
        moe(torch.zeros(2, 12, D), torch.zeros(3, C))
    assert TimeMoE(D, C, K).eval()(torch.full((1, 2, D), float("nan")), torch.zeros(1, C))[0].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({"mask_threshold": 1.5}, "mask_threshold: got 1.5, expected 0 to 1"),
        ({"mask_threshold": float("nan")}, "mask_threshold: got nan"),
        ({"expansion": 0}, "experts: got dim 8, num_experts 3, expansion 0"),
        ({"gate_noise": -1.0}, "gate_noise: got -1.0, expected at least 0"),
        ({"gate_gradient": "magic"}, "gate_gradient: got 'magic', expected one of straight_through, none"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SpaceMoE(**{"dim": D, "context_dim": C, "num_experts": K, **change})
