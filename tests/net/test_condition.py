"""A condition's laws, and hooks that act on their own rows alone."""

import math

import pytest
import torch

from raphael.base.config.preset import load_preset
from raphael.base.config.sampling import Sampling
from raphael.base.config.unet import PlainUNetConfig
from raphael.diffusion.denoiser import NetworkDenoiser
from raphael.diffusion.guidance import ClassifierFreeGuidance
from raphael.diffusion.prediction import Eps
from raphael.diffusion.samplers import sample
from raphael.diffusion.schedule import Schedule
from raphael.net.condition import AttentionHooks, Condition
from raphael.net.moe.unet import RaphaelUNet
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet

N, DIM, SIDE = 5, 32, 8
FIELDS = ("tokens", "mask", "vector", "picture", "level")


def full(rows, seed=0, hooks=None):
    """A condition that has everything."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(rows, *shape, generator=generator)

    return Condition(
        tokens=drawn(N, DIM),
        mask=drawn(N) > 0,
        vector=drawn(3),
        picture=drawn(2, SIDE, SIDE),
        control=(drawn(4, SIDE, SIDE), drawn(8, SIDE // 2, SIDE // 2)),
        level=drawn(),
        hooks=hooks,
    )


def same(one, other):
    plain = all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)
    residuals = all(torch.equal(a, b) for a, b in zip(one.control, other.control, strict=True))
    numbers = [None if c.hooks is None else c.hooked.tolist() if c.hooked is not None else "all" for c in (one, other)]
    marks = [None if c.conditional is None else c.conditional.tolist() for c in (one, other)]
    told = numbers[0] == numbers[1] and marks[0] == marks[1] and one.step == other.step
    return plain and residuals and one.hooks == other.hooks and told


@pytest.mark.parametrize("cut", range(1, 6))
@pytest.mark.parametrize("hooked", [False, True])
def test_a_condition_cut_in_two_and_joined_is_itself(cut, hooked):
    whole = full(6, hooks=AttentionHooks() if hooked else None)
    joined = whole.rows(slice(0, cut)).concat(whole.rows(slice(cut, 6)))
    assert same(joined, whole.rows(slice(None))) and joined.num_rows == 6


@pytest.mark.parametrize("seed", range(3))
def test_joining_is_associative_and_rows_of_rows_are_rows(seed):
    hooks = AttentionHooks(edit=lambda at, a: a)
    a, b, c = full(2, seed, hooks), full(1, seed + 1), full(3, seed + 2)
    whole = a.concat(b).concat(c)
    assert same(whole, a.concat(b.concat(c)))
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(size, (4,), generator=generator) for size in (6, 4))
    assert same(whole.rows(first).rows(second), whole.rows(first[second]))
    assert same(whole.rows([5, 0, 0]), whole.rows(torch.tensor([5, 0, 0])))
    assert whole.rows([5, 0, 0]).hooked.tolist() == [-1, 0, 0]


@torch.no_grad()
def test_hooks_put_on_a_joined_condition_know_the_null_rows_wherever_they_went():
    net, calls = network(), []
    x, t, condition = asked(net)

    def see(at, probabilities):
        calls.append((at.rows.tolist(), at.conditional.tolist()))
        return probabilities

    hooks = AttentionHooks(edit=see)
    joined = condition.concat(condition.rows([0]), null=True).concat(condition.rows([1])).with_hooks(hooks)
    for rows in ([0, 1, 2, 3], [2, 3, 0], [1, 3]):
        net(x[[0] * len(rows)], t[[0] * len(rows)], joined.rows(rows).to("cpu"))
        assert set(map(str, calls)) == {str((rows, [row != 2 for row in rows]))}, "only row 2 is a null one"
        calls.clear()
    net(x[:1].expand(3, -1, -1, -1), t[:1].expand(3), joined.rows([2]).expand(3))
    assert set(map(str, calls)) == {str(([2, 2, 2], [False] * 3))}


@torch.no_grad()
def test_guidance_marks_its_null_rows_for_a_denoiser_that_puts_hooks_on_the_whole_batch():
    marks = []

    def denoiser(x, sigma, cond):
        marks.append(cond.conditional)
        return x

    one = Condition(torch.zeros(3, N, DIM))
    ClassifierFreeGuidance(denoiser, 2.0, one.rows([0]))(torch.zeros(3, 4, 2, 2), torch.ones(3), one)
    assert marks[0].tolist() == [True] * 3 + [False] * 3


def test_rows_are_those_of_each_field():
    whole, index = full(6), [4, 1]
    picked = whole.rows(index)
    for name in FIELDS:
        assert torch.equal(getattr(picked, name), torch.stack([getattr(whole, name)[i] for i in index]))
    assert torch.equal(picked.control[1], torch.stack([whole.control[1][i] for i in index]))


def test_expanding_is_taking_the_row_again_and_again_and_copies_nothing():
    one = full(1, hooks=AttentionHooks())
    wide = one.expand(4)
    assert same(wide, one.rows([0, 0, 0, 0])) and wide.tokens.data_ptr() == one.tokens.data_ptr()
    assert wide.expand(4) is wide
    with pytest.raises(ValueError, match="expand: got 4 rows, expected 1 to stand for 5"):
        wide.expand(5)


def test_what_tells_nothing_fits_every_batch():
    nothing = Condition()
    assert nothing.num_rows is None and nothing.expand(7) is nothing and nothing.rows([3]) is nothing
    assert nothing.concat(Condition()).num_rows is None


def test_a_missing_mask_beside_another_counts_every_token():
    tokens, mask = torch.zeros(2, N, DIM), torch.zeros(2, N, dtype=torch.bool)
    assert Condition(tokens, mask).concat(Condition(tokens)).mask.tolist() == [[False] * N] * 2 + [[True] * N] * 2
    assert Condition(tokens).concat(Condition(tokens)).mask is None


def test_shorter_tokens_are_repeated_and_masked_beside_longer_ones():
    short, long = torch.randn(1, 2, 3), torch.randn(2, 5, 3)
    joined = Condition(short, torch.tensor([[True, False]])).concat(Condition(long))
    assert torch.equal(joined.tokens[1:], long) and joined.mask[1:].all()
    assert torch.equal(joined.tokens[0], short[0, [0, 1, 0, 1, 0]])
    assert joined.mask[0].tolist() == [True, False, False, False, False]
    other = Condition(long).concat(Condition(short))
    assert torch.equal(other.tokens[2], joined.tokens[0]) and other.mask[2].tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="hooks: got 2 tokens beside 5, expected one number: hooks count them"):
        Condition(short).with_hooks(AttentionHooks(edit=lambda call, maps: maps)).concat(Condition(long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": torch.zeros(3, 2)}, "rows tokens 2, vector 3, expected one number"),
        ({"vector": torch.zeros(2)}, r"vector: got shape \(2,\), expected \(B, V\)"),
        ({"level": torch.zeros(2, 1)}, r"level: got shape \(2, 1\)"),
        ({"picture": torch.zeros(2, 3, 8)}, r"picture: got shape \(2, 3, 8\), expected \(B, C, h, w\)"),
        ({"mask": torch.zeros(2, N)}, "mask: got torch.float32, expected torch.bool"),
        ({"mask": torch.zeros(2, N + 1, dtype=torch.bool)}, r"mask: got shape \(2, 6\), expected \(B, N\) = \(2, 5\)"),
        ({"tokens": None, "mask": torch.zeros(2, N, dtype=torch.bool)}, "mask: got one without tokens"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Condition(**{"tokens": torch.zeros(2, N, DIM), **change})


def test_what_cannot_be_joined_is_refused():
    tokens, vector = torch.zeros(1, N, DIM), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="concat: got no vector in the second condition"):
        Condition(tokens, vector=vector).concat(Condition(tokens))
    with pytest.raises(ValueError, match="concat: got no tokens in the first condition"):
        Condition(vector=vector).concat(Condition(tokens, vector=vector))
    with pytest.raises(ValueError, match="concat: vector: got .* expected one shape"):
        Condition(vector=vector).concat(Condition(vector=torch.zeros(1, 4)))
    with pytest.raises(ValueError, match="got two sets of hooks"):
        full(1, hooks=AttentionHooks(edit=lambda at, a: a)).concat(full(1, hooks=AttentionHooks(edit=lambda at, a: a)))
    with pytest.raises(ValueError, match="hooks on a condition without rows"):
        Condition(hooks=AttentionHooks()).concat(Condition())


def network(**changes):
    """Of text: RAPHAEL's block where nothing is changed, the plain one otherwise; no layer of zeros."""
    torch.manual_seed(0)
    preset = load_preset("tiny-debug").unet
    if changes:
        shape = {"channels": (16, 32), "res_blocks": 1, "attention_levels": (0, 1), "head_dim": 8, "norm_groups": 8}
        net = UNet(PlainUNetConfig(**shape, context_dim=DIM, context_length=N, **changes), PlainBlock)
    else:
        net = RaphaelUNet(preset)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return net.eval()


def asked(net, rows=2, side=SIDE):
    generator = torch.Generator().manual_seed(1)
    config = net.config
    x = torch.randn(rows, config.latent_channels, side, side, generator=generator)
    tokens = torch.randn(rows, config.context_length, config.context_dim, generator=generator)
    mask = torch.arange(config.context_length) < torch.tensor([3, 5] * rows)[:rows, None]
    return x, torch.full((rows,), 400.0), Condition(tokens, mask)


def first_token(at, probabilities):
    """All attention to the first key."""
    return torch.zeros_like(probabilities).index_fill_(-1, torch.tensor([0]), 1.0)


@pytest.mark.parametrize("kind", ["raphael", "plain"])
@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("side", [8, 32])
@torch.no_grad()
def test_hooks_change_their_own_rows_and_leave_the_others_bytes_alone(kind, collect, side):
    """32 x 32: maps that the fused kernel computes where nobody edits."""
    net = network() if kind == "raphael" else network(expansion=2.0)
    x, t, condition = asked(net, 2, side)
    null = condition.rows([1, 0])
    hooks = AttentionHooks(lambda at, scores: 3.0 * torch.ones_like(scores).cumsum(-1), first_token)
    both, twice = torch.cat([x, x]), torch.cat([t, t])
    plain = net(both, twice, condition.concat(null), collect=collect).prediction
    edited = net(both, twice, condition.with_hooks(hooks).concat(null), collect=collect).prediction
    assert torch.equal(edited[2:], plain[2:]) and not torch.allclose(edited[:2], plain[:2], atol=1e-3)


@torch.no_grad()
def test_an_edit_that_leaves_a_row_of_its_own_alone_leaves_it_as_it_was():
    net = network()
    x, t, condition = asked(net)

    def second(at, probabilities):
        return torch.where(at.rows.view(-1, 1, 1, 1) == 1, first_token(at, probabilities), probabilities)

    plain = net(x, t, condition).prediction
    edited = net(x, t, condition.with_hooks(AttentionHooks(edit=second))).prediction
    assert torch.equal(edited[0], plain[0]) and not torch.allclose(edited[1], plain[1], atol=1e-3)


@torch.no_grad()
def test_an_edited_row_does_not_depend_on_the_rows_beside_it():
    net = network(expansion=2.0)
    x, t, condition = asked(net, 4)
    hooked = condition.with_hooks(AttentionHooks(edit=first_token))
    whole = net(x, t, hooked).prediction
    part = net(x[[3, 1]], t[:2], hooked.rows([3, 1])).prediction
    torch.testing.assert_close(part, whole[[3, 1]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_hook_is_told_which_rows_it_has_and_gets_no_others():
    net, told = network(expansion=2.0), []
    x, t, condition = asked(net, 3)
    hooks = AttentionHooks(edit=lambda at, a: told.append((at.site.kind, *at.rows.tolist(), len(a))) or a)
    hooked = condition.with_hooks(hooks).rows([2, 0]).concat(condition.rows([1]))
    net(x, t, hooked.rows([2, 0, 1]))
    assert set(told) == {("self", 2, 0, 2), ("cross", 2, 0, 2)} and len(told) == 2 * net.num_blocks


@torch.no_grad()
def test_the_map_that_is_collected_is_the_edited_one():
    net = network()
    x, t, condition = asked(net)
    output = net(x, t, condition.with_hooks(AttentionHooks(edit=first_token)), collect=True)
    for block in output.blocks:
        assert (block.attention[..., 0] == 1).all() and (block.attention[..., 1:] == 0).all()


@torch.no_grad()
def test_a_bias_is_added_to_the_scores_before_the_softmax_of_cross_attention_alone():
    net, seen = network(expansion=2.0), []
    x, t, condition = asked(net)
    bias = 0.7 * torch.arange(N, dtype=torch.float32)

    def note(at, probabilities):
        if at.site == site:
            seen.append(probabilities)
        return probabilities

    kinds = []
    net(x, t, condition.with_hooks(AttentionHooks(edit=lambda at, a: kinds.append(at.site) or a)))
    site = next(site for site in kinds if site.kind == "cross")  # before it, nothing differs
    net(x, t, condition.with_hooks(AttentionHooks(edit=note)))
    net(x, t, condition.with_hooks(AttentionHooks(lambda at, s: seen.append(at.site.kind) or bias, note)))
    plain, biased = (item for item in seen if isinstance(item, torch.Tensor))
    weighted = plain * bias.exp()
    torch.testing.assert_close(biased, weighted / weighted.sum(-1, keepdim=True))
    assert {item for item in seen if isinstance(item, str)} == {"cross"}


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_hooks_are_told_the_sigma_and_the_progress_of_every_step_and_guidance_shows_them_conditional_rows(name):
    net, told = network(expansion=2.0), []
    schedule = Schedule(load_preset("tiny").diffusion)
    x, _, condition = asked(net)
    hooks = AttentionHooks(edit=lambda at, a: told.append((at.sigma, at.progress, at.rows.tolist())) or a)
    null = Condition(torch.zeros(1, N, DIM))
    denoiser = ClassifierFreeGuidance(NetworkDenoiser(net, schedule, Eps()), 3.0, null)
    sigmas = schedule.sampling_sigmas(4)
    with torch.no_grad():
        sample(Sampling(name), denoiser, x, sigmas, condition.with_hooks(hooks), lambda step: torch.zeros_like(x))
    levels = list(dict.fromkeys(sigma for sigma, _, _ in told))
    assert levels == pytest.approx([float(sigma) for sigma in sigmas if sigma > 0])
    for sigma, progress, rows in told:
        timestep = float(schedule.timestep(torch.tensor([sigma]))[0])
        assert progress == pytest.approx(1 - timestep / (schedule.num_steps - 1), abs=1e-6) and rows == [0, 1]
    assert told[0][1] == pytest.approx(0, abs=1e-6) and 0 < told[-1][1] < 1


def test_hooked_rows_of_one_step_lie_at_one_noise_level():
    hooked = full(2, hooks=AttentionHooks()).concat(full(1))
    at = hooked.at(torch.tensor([2.0, 2.0, 9.0]), torch.tensor([0.25, 0.25, 0.0]))
    assert (at.step.sigma, at.step.progress) == (2.0, 0.25)
    assert hooked.at(torch.full((3,), math.inf), torch.zeros(3)).step.sigma == math.inf
    with pytest.raises(ValueError, match="rows at noise levels"):
        hooked.at(torch.tensor([2.0, 3.0, 9.0]), torch.zeros(3))
    plain = full(3)
    assert plain.at(torch.tensor([2.0, 3.0, 9.0]), torch.zeros(3)) is plain


def test_gradients_pass_through_hooks_to_the_network_and_to_the_edit():
    net = network(expansion=2.0)
    x, t, condition = asked(net)
    push = torch.zeros(N, requires_grad=True)
    hooks = AttentionHooks(lambda at, scores: push, lambda at, a: 0.5 * a)
    net(x, t, condition.with_hooks(hooks)).prediction.square().sum().backward()
    assert push.grad.abs().sum() > 0 and all(p.grad is not None for p in net.parameters())


def test_a_condition_moves_whole_and_its_numbers_of_rows_stay_where_hooks_read_them():
    moved = full(2, hooks=AttentionHooks()).concat(full(1)).to("meta")
    assert {moved.tokens.device.type, moved.control[1].device.type, moved.level.device.type} == {"meta"}
    assert moved.hooked.device.type == "cpu"
