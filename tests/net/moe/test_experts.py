import copy

import pytest
import torch
from truth import moe_loops

from raphael.net.memory import weights_version
from raphael.net.moe.experts import COVERED_FROM, ExpertBank, choose_plan
from raphael.net.moe.mixtures import SpaceMoE, TimeMoE

B, P, N, D, C, K = 2, 12, 7, 8, 10, 3
PLANS = ("fused", "covered")


def space_moe(**changes):
    torch.manual_seed(1)
    moe = SpaceMoE(D, C, K, **{"expansion": 2, "mask_threshold": 0.5, **changes}).double().eval()
    with torch.no_grad():  # biases away from zero, else e_k(0) = 0 and half of the identity is not tested
        for parameter in moe.experts.parameters():
            parameter.normal_()
    return moe


def inputs(seed=0):
    torch.manual_seed(seed)
    h, context = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((B, P, D), (B, N, C)))
    return h, context, torch.softmax(3 * torch.randn(B, P, N, dtype=torch.float64), dim=-1)


def gradients(out, tensors):
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), tensors, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_equals_the_token_loop_in_value_and_in_every_gradient(plan, masked):
    moe = space_moe()
    moe.plan = plan
    h, context, attention = inputs()
    mask = torch.arange(N) < torch.tensor([[4], [7]]) if masked else None
    fast, routing = moe(h, context, attention, mask)
    slow = moe_loops.space_moe(moe, h, context, attention, mask)
    assert (routing.cover < K).all()  # some pixels do without some expert, else the gathering is not tested
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    tensors = [h, context, *moe.parameters()]
    for mine, true in zip(gradients(fast, tensors), gradients(slow, tensors), strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_plans_agree_at_every_cover_with_and_without_gradients(share):
    torch.manual_seed(4)
    bank = ExpertBank(D, K, 2).double()
    h = torch.randn(B, P, D, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(bank.b1)
    inside, outside = (
        (torch.rand(B, P, K, dtype=torch.float64) * (torch.rand(B, P, K) < share)).requires_grad_() for _ in range(2)
    )
    fused, covered = (bank.weighted_sum(h, inside, outside, plan) for plan in PLANS)
    torch.testing.assert_close(covered, fused, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(bank.weighted_sum(h, inside, outside, "covered"), fused, rtol=0, atol=1e-12)
    tensors = [h, inside, outside, *bank.parameters()]
    fused_gradients, covered_gradients = (gradients(out, tensors) for out in (fused, covered))
    for k, (one, other) in enumerate(zip(fused_gradients, covered_gradients, strict=True)):
        # the plan `covered` has no gradient of the weight of a row it left out
        other = torch.where(inside != 0, other, one) if k == 1 else other
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [(), ("h",), ("inside",), ("outside",), ("w1",), ("b1", "w2"), ("b2",)])
def test_the_covered_plan_gives_gradients_to_what_is_trained_and_to_nothing_else(trained):
    torch.manual_seed(4)
    bank = ExpertBank(D, K, 2).double()
    inputs = {
        name: torch.rand(B, P, width, dtype=torch.float64) for name, width in (("h", D), ("inside", K), ("outside", K))
    }
    tensors = {**inputs, **dict(bank.named_parameters())}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    fused, covered = (bank.weighted_sum(*inputs.values(), plan) for plan in PLANS)
    assert covered.requires_grad == bool(trained)
    if trained:
        wanted = [tensors[name] for name in trained]
        torch.testing.assert_close(gradients(covered, wanted), gradients(fused, wanted), rtol=0, atol=1e-12)


def test_under_autocast_the_covered_plan_computes_in_bf16_and_its_gradients_have_the_weights_type():
    torch.manual_seed(4)
    bank, h, weight = ExpertBank(D, K, 2), torch.randn(B, P, D, requires_grad=True), torch.rand(B, P, K)
    exact = gradients(bank.weighted_sum(h, weight, 1 - weight, "fused"), [h, *bank.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        out = bank.weighted_sum(h, weight, 1 - weight, "covered")
    assert out.dtype == torch.bfloat16
    for mine, true in zip(gradients(out, [h, *bank.parameters()]), exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).norm() <= 0.02 * true.norm()


def test_recomputing_the_covered_plan_changes_no_bit_of_its_gradients():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(4)
    bank, h, weight = ExpertBank(D, K, 2), torch.randn(B, P, D, requires_grad=True), torch.rand(B, P, K)
    tensors = [h, *bank.parameters()]
    plain = gradients(bank.weighted_sum(h, weight, weight, "covered"), tensors)
    again = checkpoint(bank.weighted_sum, h, weight, weight, "covered", use_reentrant=False)
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(again, tensors), strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_in_every_plan_an_expert_nobody_chose_has_a_gradient_and_it_is_zero(plan):
    moe = space_moe()
    moe.plan = plan
    with torch.no_grad():
        moe.gate.net[2].bias.copy_(torch.tensor([100.0, 0.0, 0.0]))
    h, context, attention = inputs()
    for seen in (attention, torch.zeros_like(attention)):  # some pixels covered, and none
        moe.zero_grad()
        moe(h, context, seen)[0].square().sum().backward()
        for parameter in moe.experts.parameters():
            assert parameter.grad is not None and (parameter.grad[1:] == 0).all()


@pytest.mark.parametrize("plan", PLANS)
def test_a_nan_stays_in_its_pixel_in_every_plan_and_is_never_hidden(plan):
    moe = space_moe(mask_threshold=0.9)
    moe.plan = plan
    h, context, attention = inputs()
    broken = h.detach().clone()
    broken[0, 3, 2] = float("nan")
    with torch.no_grad():
        out, _ = moe(broken, context, attention)
    undefined = out.isnan().any(-1)
    assert undefined[0, 3] and undefined.sum() == 1


@pytest.mark.parametrize("gate_gradient", ["straight_through", "none"])
@pytest.mark.parametrize("where", ["attention", "context"])
def test_a_nan_in_a_token_makes_its_sample_nan_unless_the_token_is_masked(where, gate_gradient):
    moe = space_moe(gate_gradient=gate_gradient)
    h, context, attention = (tensor.detach() for tensor in inputs())
    (attention[0, :, 5] if where == "attention" else context[0, 5]).fill_(float("nan"))
    out, _ = moe(h, context, attention)
    assert out[0].isnan().all() and out[1].isfinite().all()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 5] = False
    assert moe(h, context, attention, mask)[0].isfinite().all()


def test_the_plan_is_chosen_by_shape_and_device_and_never_by_what_was_routed():
    assert choose_plan(torch.empty(1, 16, 8), 16) == "fused"  # many small kernels cost more than they save
    assert choose_plan(torch.empty(1, 1024, 320), 1280) == "covered"
    assert choose_plan(torch.empty(1, 1024, 320, device="meta"), 1280) == "fused"
    with pytest.raises(ValueError, match="plan: got 'slow', expected one of auto, fused, covered"):
        ExpertBank(D, K, 2).weighted_sum(torch.zeros(1, 2, D), torch.zeros(1, 2, K), torch.zeros(1, 2, K), "slow")


def test_a_sample_drawn_with_the_covered_plan_is_the_same_to_the_bit_beside_any_other():
    width, pixels = 64, 256
    assert pixels * width * 4 * width >= COVERED_FROM
    torch.manual_seed(5)
    moe = SpaceMoE(width, C, K).eval()
    h, context, attention = torch.randn(3, pixels, width), torch.randn(3, N, C), torch.rand(3, pixels, N) ** 3
    with torch.inference_mode():
        alone = moe(h[:1], context[:1], attention[:1])[0]
        beside = moe(h[[0, 1]], context[[0, 1]], attention[[0, 1]])[0]
        other = moe(h[[0, 2]], context[[0, 2]], attention[[0, 2]])[0]
    assert torch.equal(beside[:1], other[:1]) and torch.equal(alone, beside[:1])


def change_by_optimizer(bank):
    # fused AdamW writes without counting it in Tensor._version
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, fused=True)
    for parameter in bank.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def change_by_copy(bank):
    with torch.no_grad():
        bank.b2.copy_(torch.ones_like(bank.b2))


def change_by_loading(bank):
    bank.load_state_dict({name: tensor + 1 for name, tensor in bank.state_dict().items()})


def change_type(bank):
    bank.bfloat16().float()


@pytest.mark.parametrize("change", [change_by_optimizer, change_by_copy, change_by_loading, change_type])
def test_the_experts_at_zero_are_kept_until_the_weights_change_by_whatever_way(change):
    torch.manual_seed(6)
    bank = ExpertBank(D, K, 2)
    torch.nn.init.normal_(bank.b1)
    bank.remember(True)
    with torch.no_grad():
        before = bank.at_zero()
        assert bank.at_zero() is before
    change(bank)
    if change is change_by_optimizer:
        bank.remember(True)  # as drawing begins: nothing else tells
    with torch.no_grad():
        after = bank.at_zero()
        truth = torch.stack([moe_loops.gelu(b1) @ w2.T + b2 for _, b1, w2, b2 in bank.experts()])
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, truth)


def test_the_experts_at_zero_carry_gradients_in_training_and_follow_a_copy_of_the_module():
    bank = ExpertBank(D, K, 2)
    bank.remember(True)
    with torch.no_grad():
        bank.at_zero()
    assert bank.at_zero().requires_grad
    twin = copy.deepcopy(bank)
    with torch.no_grad():
        twin.b2.add_(1)
        assert torch.equal(twin.at_zero(), bank.at_zero() + 1)


def test_under_autocast_the_experts_at_zero_are_kept_apart():
    bank = ExpertBank(D, K, 2)
    bank.remember(True)
    with torch.no_grad():
        wide = bank.at_zero()
        with torch.autocast("cpu", torch.bfloat16):
            narrow = bank.at_zero()
        assert torch.equal(bank.at_zero(), wide)
    torch.testing.assert_close(narrow.float(), wide, rtol=0.02, atol=0.02)


def test_outside_of_sampling_nothing_is_kept_and_an_optimizer_that_leaves_no_trace_does_no_harm():
    bank = ExpertBank(D, K, 2)
    with torch.no_grad():
        before = bank.at_zero()
        assert bank.at_zero() is not before
    version = weights_version(bank.parameters())
    change_by_optimizer(bank)
    assert weights_version(bank.parameters()) == version, "fused AdamW counts its writes now: simplify `remembering`"
    with torch.no_grad():
        assert not torch.equal(bank.at_zero(), before)


def test_tensors_that_count_no_writes_have_no_version():
    with torch.inference_mode():
        assert weights_version([torch.zeros(2)]) is None


def test_on_the_meta_device_both_mixtures_have_their_shapes():
    with torch.device("meta"):
        space, time = SpaceMoE(D, C, K).eval(), TimeMoE(D, C, K).eval()
        h = torch.empty(B, P, D)
        assert space(h, torch.empty(B, N, C), torch.empty(B, P, N))[0].shape == (B, P, D)
        assert time(h, torch.empty(B, C))[0].shape == (B, P, D)


@pytest.mark.parametrize("plan", ["fused", "covered"])
@pytest.mark.parametrize("bf16", [False, True])
def test_kept_casts_change_no_bit_and_are_made_again_when_a_weight_changes(plan, bf16):
    bank = ExpertBank(8, 3, 2)
    h, weight = torch.randn(2, 6, 8), torch.rand(2, 6, 3)

    @torch.no_grad()
    def drawn():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return bank.weighted_sum(h, weight, weight, plan)

    for _ in range(2):
        plain = drawn()
        bank.remember(True)
        assert torch.equal(drawn(), plain) and torch.equal(drawn(), plain)
        with torch.no_grad():
            bank.w1.mul_(2)
            bank.w2.add_(1)
        assert not torch.equal(drawn(), plain)
        changed = drawn()
        bank.remember(False)
        assert torch.equal(drawn(), changed)


def test_kept_casts_are_no_part_of_a_gradient_and_go_when_the_module_moves():
    bank, h, weight = ExpertBank(8, 3, 2), torch.randn(1, 6, 8), torch.rand(1, 6, 3)
    bank.remember(True)
    with torch.no_grad():
        want = bank.weighted_sum(h, weight, weight, "fused")
    assert bank.weighted_sum(h, weight, weight, "fused").requires_grad
    with torch.no_grad():
        torch.testing.assert_close(
            bank.double().weighted_sum(h.double(), weight.double(), weight.double(), "fused"), want.double()
        )


@pytest.mark.parametrize("plan", PLANS)
def test_gated_experts_are_a_value_times_the_gelu_of_a_gate_in_every_plan(plan):
    torch.manual_seed(0)
    moe = SpaceMoE(D, C, K, mask_threshold=0.5).eval()
    moe.experts = ExpertBank(D, K, 2, "geglu")
    moe = moe.double()
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.normal_()
    moe.plan = plan
    h, context, attention = inputs()
    fast, _ = moe(h, context, attention)
    expert_BN, _, _ = moe.gate(context)
    normal = torch.distributions.Normal(0, 1)
    inside = attention >= 0.5 * attention.amax(1, keepdim=True)
    slow = torch.zeros_like(h)
    for b in range(B):
        for i in range(N):
            w1, b1, w2, b2 = (weights[expert_BN[b, i]] for weights in moe.experts.parameters())
            masked = h[b] * inside[b, :, i, None]
            value, gate = (masked @ w1.T + b1).split(2 * D, dim=1)
            slow[b] += (value * gate * normal.cdf(gate)) @ w2.T + b2
    torch.testing.assert_close(fast, slow / N, rtol=0, atol=1e-11)
