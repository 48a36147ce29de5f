from dataclasses import replace

import pytest
import torch

from raphael.base.config.params import load_config
from raphael.base.config.preset import load_preset
from raphael.base.randomness import SampleRng
from raphael.base.records import EDGES, MOMENTS, TEXT, TEXT_MASK, TOKEN_IDS
from raphael.diffusion.prediction import Eps, Velocity
from raphael.net.condition import Condition
from raphael.net.moe.gate import Routing
from raphael.net.moe.unet import RaphaelUNet
from raphael.objectives.denoising import DenoisingObjective, LatentScale, min_snr_weights, shifted
from raphael.objectives.timesteps import by_quarter

PRESET = load_preset("tiny-debug")
SHAPE = PRESET.unet
PREDICTIONS = {"eps": Eps(), "v": Velocity()}
TABLE = torch.randn(100, SHAPE.context_dim, generator=torch.Generator().manual_seed(0))


def encode_text(tokens):
    return Condition(TABLE[tokens], tokens > 0)


def objective(prediction="v", unet=None, **changes):
    from pathlib import Path

    torch.manual_seed(0)
    changes = {"latents": "sample", "timestep_shift": 1.0, **changes}
    config = replace(load_config(Path(__file__).parents[2] / "params.yaml").training(), **changes)
    net = RaphaelUNet(replace(SHAPE, **(unet or {})))
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    empty = torch.tensor([1, 2] + [0] * (SHAPE.context_length - 2))
    diffusion = replace(PRESET.diffusion, prediction=prediction)
    return DenoisingObjective(net, encode_text, empty, diffusion, config, LatentScale(2.0, 0.1)).train()


def batch(indices):
    """Records as a function of their index."""
    records = []
    for index in indices:
        generator = torch.Generator().manual_seed(index)
        length = 4 + index % 5
        tokens = torch.zeros(SHAPE.context_length, dtype=torch.long)
        tokens[:length] = torch.randint(1, 100, (length,), generator=generator)
        edges = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8)
        records.append({MOMENTS: torch.randn(8, 8, 8, generator=generator), TOKEN_IDS: tokens, EDGES: edges})
    return {name: torch.stack([record[name] for record in records]) for name in records[0]}


def rng(indices, seed=3):
    return SampleRng(seed, 0, indices)


def test_the_loss_is_the_weighted_sum_of_its_named_parts():
    losses = objective(edge_weight=0.3, balance_weight=0.05)(batch(range(6)), rng(range(6)))
    expected = losses["denoise"] + 0.3 * losses["edge"] + 0.05 * losses["balance"]
    torch.testing.assert_close(losses["loss"], expected)


def test_losses_and_gradients_of_a_batch_are_the_means_over_its_parts():
    goal = objective()
    whole, parts = goal(batch(range(6)), rng(range(6))), []
    whole["loss"].backward()
    gradients = [p.grad.clone() for p in goal.unet.parameters()]
    goal.zero_grad()
    for part in (range(0, 3), range(3, 6)):
        parts.append(goal(batch(part), rng(part)))
        (parts[-1]["loss"] / 2).backward()
    for name in ("loss", "denoise", "edge", "balance"):
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name])
    for mine, p in zip(gradients, goal.unet.parameters(), strict=True):
        torch.testing.assert_close(p.grad, mine, rtol=1e-4, atol=1e-6)


def test_what_a_sample_sees_depends_on_its_index_and_not_on_its_neighbours():
    goal, seen = objective(), {}
    goal.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0], t=args[1], noise=kwargs["gate_noise"]), with_kwargs=True
    )
    goal(batch([7, 1, 5]), rng([7, 1, 5]))
    together = dict(seen)
    goal(batch([5]), rng([5]))
    assert torch.equal(seen["x"][0], together["x"][2]) and seen["t"][0] == together["t"][2]
    assert torch.equal(seen["noise"].space[0], together["noise"].space[2])


def test_the_edge_loss_is_zero_above_the_cut_off_and_counts_by_the_batch_size():
    indices = range(16)
    goal = objective(edge_max_timestep=500)
    times = []
    goal.unet.register_forward_pre_hook(lambda module, args: times.append(args[1]))
    edge = goal(batch(indices), rng(indices))["edge"]
    below = [i for i in indices if times[0][i] <= 500]
    assert 0 < len(below) < 16
    alone = [objective(edge_max_timestep=1000)(batch([i]), rng([i]))["edge"] for i in below]
    torch.testing.assert_close(edge, sum(alone) / 16)
    at = max(int(times[0][i]) for i in below)  # the cut-off itself counts
    assert objective(edge_max_timestep=at)(batch(indices), rng(indices))["edge"] == edge
    above = [i for i in indices if times[0][i] > 500]
    assert objective(edge_max_timestep=500)(batch(above), rng(above))["edge"] == 0


def test_blocks_of_the_edge_loss_count_by_their_weights():
    """Against the naive sum, block by block, of losses taken from the network's own edge maps."""
    from raphael.net.moe.edge import focal_loss

    weights = tuple(float(number) for number in range(SHAPE.num_blocks))  # the first block is left out
    goal, seen = objective(edge_max_timestep=1000, edge_block_weights=weights, balance="none"), []
    goal.unet.register_forward_hook(lambda module, args, output: seen.extend(output.blocks))
    records = batch(range(4))
    edge = goal(records, rng(range(4)))["edge"]
    assert len(seen) == SHAPE.num_blocks
    naive = 0.0
    for weight, block in zip(weights, seen, strict=True):
        for sample in range(4):
            target = torch.zeros(block.height, block.width)
            factor = 8 // block.height
            for y in range(block.height):
                for x in range(block.width):
                    target[y, x] = records[EDGES][
                        sample, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor
                    ].max()
            loss = focal_loss(
                block.edge_logits[sample, 0], target / 255, goal.config.focal_alpha, goal.config.focal_gamma
            )
            naive += weight * float(loss.detach().mean()) / (4 * SHAPE.num_blocks)
    assert float(edge.detach()) == pytest.approx(naive, rel=1e-5)
    edge.backward()
    heads = [block.edge_head for block in goal.unet.transformer_blocks()]
    assert all(not p.grad.any() for p in heads[0].parameters()) and all(p.grad.any() for p in heads[1].parameters())


def test_equal_weights_of_blocks_change_nothing_and_a_wrong_number_of_them_is_refused():
    plain, ones = objective(), objective(edge_block_weights=(1.0,) * SHAPE.num_blocks)
    assert torch.equal(*(goal(batch(range(4)), rng(range(4)))["loss"] for goal in (plain, ones)))
    with pytest.raises(
        ValueError, match=f"edge_block_weights: got 2 numbers, expected {SHAPE.num_blocks}, one for each"
    ):
        objective(edge_block_weights=(1.0, 1.0))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_dropped_caption_is_replaced_by_the_empty_one(share):
    goal, seen = objective(caption_drop=share), []
    goal.encode_text = lambda tokens: seen.append(tokens) or encode_text(tokens)
    records = batch(range(4))
    goal(records, rng(range(4)))
    expected = goal.empty_tokens.expand(4, -1) if share else records[TOKEN_IDS]
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_network_that_predicts_zero_pays_the_mean_square_of_the_target(prediction):
    goal = objective(prediction)
    torch.nn.init.zeros_(goal.unet.conv_out.weight)
    torch.nn.init.zeros_(goal.unet.conv_out.bias)
    indices = range(64)
    losses = goal(batch(indices), rng(indices))
    noise = rng(indices).normal("noise", (4, 8, 8))
    if prediction == "eps":
        torch.testing.assert_close(losses["denoise"], noise.square().mean())
    else:
        t = (rng(indices).uniform("timestep") * 1000).long()
        moments, latent_noise = batch(indices)[MOMENTS], rng(indices).normal("latent", (4, 8, 8))
        mean, log_variance = moments.chunk(2, 1)
        x0 = (mean + (log_variance / 2).exp() * latent_noise - 0.1) * 2.0
        alpha_bar = goal.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        torch.testing.assert_close(
            losses["denoise"], (alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0).square().mean()
        )


def test_the_loads_of_a_gate_sum_to_one():
    losses = objective()(batch(range(5)), rng(range(5)))
    for kind, count in (("space", SHAPE.num_space_experts), ("time", SHAPE.num_time_experts)):
        loads = [losses[f"{kind}_load/block00_expert{k}"] for k in range(count)]
        torch.testing.assert_close(sum(loads), torch.tensor(1.0))


def test_no_gradient_reaches_the_text_encoder():
    goal, table = objective(), TABLE.clone().requires_grad_()
    goal.encode_text = lambda tokens: Condition(table[tokens], tokens > 0)
    goal(batch(range(2)), rng(range(2)))["loss"].backward()
    assert table.grad is None


def test_the_posterior_mean_can_be_learnt_instead_of_a_draw():
    goal, seen = objective(latents="mean"), []
    goal.schedule.add_noise = lambda x0, noise, t: seen.append(x0) or x0
    records = batch([3])
    goal(records, rng([3]))
    torch.testing.assert_close(seen[0], (records[MOMENTS][:, :4] - 0.1) * 2.0)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_shares_have_their_distribution_in_closed_form(shift):
    """P(share < x) = x / (s + (1 - s) x), what solving the shift for u gives."""
    shares = shifted(torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1], shift)
    for x in (0.1, 0.5, 0.9):
        assert (shares < x).double().mean().item() == pytest.approx(x / (shift + (1 - shift) * x), abs=2e-5)
    assert shares.min() == 0 and shares.max() < 1


def test_the_shift_moves_the_timesteps_of_training_towards_noise():
    seen = {}
    for shift in (1.0, 4.0):
        goal = objective(timestep_shift=shift)
        goal.unet.register_forward_pre_hook(lambda _, inputs, shift=shift: seen.__setitem__(shift, inputs[1]))
        goal(batch(range(6)), rng(range(6)))
    u = rng(range(6)).uniform("timestep")
    assert torch.equal(seen[1.0], (u * 1000).long()) and torch.equal(seen[4.0], (4 * u / (1 + 3 * u) * 1000).long())


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_are_the_papers_closed_form(prediction):
    """arXiv 2303.09556: min(SNR, gamma) on x_0, over SNR for eps, over SNR + 1 for v."""
    snr = torch.tensor([1e-4, 0.5, 4.9, 5.0, 5.1, 1000.0], dtype=torch.float64)
    expected = [1, 1, 1, 1, 5 / 5.1, 0.005]
    if prediction == "v":
        expected = [1e-4 / 1.0001, 0.5 / 1.5, 4.9 / 5.9, 5 / 6, 5 / 6.1, 5 / 1001]
    weights = min_snr_weights(snr / (1 + snr), 5.0, PREDICTIONS[prediction])
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_min_snr_weights_make_the_losses_of_eps_and_of_v_one_loss_of_x0():
    """The same error of x_0, told as eps and as v, weighs min(SNR, gamma) times its square."""
    alpha_bar = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    error, snr = 0.3, alpha_bar / (1 - alpha_bar)
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    of_eps = -signal / spread * error
    of_v = signal * of_eps - spread * error
    expected = snr.clamp(max=5) * error**2
    torch.testing.assert_close(min_snr_weights(alpha_bar, 5.0, Eps()) * of_eps**2, expected)
    torch.testing.assert_close(min_snr_weights(alpha_bar, 5.0, Velocity()) * of_v**2, expected)


def test_where_no_signal_is_left_a_sample_still_counts():
    assert min_snr_weights(torch.zeros(1, dtype=torch.float64), 5.0, Velocity()) == 1


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weighs_each_sample_of_the_denoising_loss_and_leaves_the_others(prediction):
    indices = range(12)
    goal, plain = objective(prediction, min_snr_gamma=5.0), objective(prediction)
    weighted, unweighted = goal(batch(indices), rng(indices)), plain(batch(indices), rng(indices))
    t = (rng(indices).uniform("timestep") * 1000).long()
    weights = min_snr_weights(goal.schedule.alpha_bar[t], 5.0, PREDICTIONS[prediction]).float()
    alone = torch.stack([plain(batch([i]), rng([i]))["denoise"] for i in indices])
    torch.testing.assert_close(weighted["denoise"], (weights * alone).mean(), rtol=1e-4, atol=1e-6)
    assert torch.equal(weighted["edge"], unweighted["edge"]) and weighted["denoise"] < unweighted["denoise"]
    everything = objective(prediction, min_snr_gamma=1e9)(batch(indices), rng(indices))["denoise"]
    if prediction == "eps":  # an endless gamma is no weighting of eps
        torch.testing.assert_close(everything, unweighted["denoise"])


def test_training_at_zero_terminal_snr_is_finite_at_its_last_timestep():
    goal = objective()
    diffusion = replace(PRESET.diffusion, zero_terminal_snr=True)
    goal = DenoisingObjective(
        goal.unet, encode_text, goal.empty_tokens, diffusion, replace(goal.config, min_snr_gamma=5.0), LatentScale(2.0)
    )
    goal.schedule.alpha_bar[:] = 0  # whatever timestep is drawn, nothing of the image is left
    losses = goal(batch(range(4)), rng(range(4)))
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in goal.unet.parameters() if p.grad is not None)
    assert losses["denoise"] > 0


def test_loss_free_balance_moves_every_gates_bias_against_its_load_and_is_saved_with_the_weights():
    target = objective(balance="loss_free", balance_rate=0.01)
    losses = target(batch(range(6)), rng(range(6)))
    assert losses["balance"] == 0
    state = target.state_dict()
    for index, block in enumerate(target.unet.transformer_blocks()):
        load = [losses[f"space_load/block{index:02d}_expert{k}"] for k in range(SHAPE.num_space_experts)]
        expected = 0.01 * torch.sign(torch.stack(load).mean() - torch.stack(load))
        bias = block.space_moe.gate.balance_bias
        torch.testing.assert_close(bias, expected)
        assert any(name.endswith("space_moe.gate.balance_bias") and value is not None for name, value in state.items())
    target.eval()(batch(range(2)), rng(range(2)))
    assert torch.equal(bias, expected)  # only training moves it


def test_without_balance_no_bias_moves_and_nothing_is_added():
    target = objective(balance="none", balance_weight=1.0)
    losses = target(batch(range(4)), rng(range(4)))
    torch.testing.assert_close(losses["loss"], losses["denoise"] + target.config.edge_weight * losses["edge"])
    assert all((b.space_moe.gate.balance_bias == 0).all() for b in target.unet.transformer_blocks())


def test_edges_can_be_judged_at_the_size_of_the_targets():
    at_map, at_target = (objective(edge_resolution=name) for name in ("map", "target"))
    one, other = (target(batch(range(4)), rng(range(4)))["edge"] for target in (at_map, at_target))
    assert one.isfinite() and other.isfinite() and one != other


@pytest.mark.parametrize("balance", ["switch", "loss_free"])
@pytest.mark.parametrize(
    "unet", [{"space_layer": "dense"}, {"time_layer": "none"}, {"space_layer": "none", "time_layer": "dense"}]
)
def test_the_loss_of_a_network_without_a_mixture_has_only_the_parts_that_it_has(unet, balance):
    target = objective(unet=unet, balance=balance)
    losses = target(batch(range(4)), rng(range(4)))
    losses["loss"].backward()
    loads = {name.split("_load")[0] for name in losses if "_load/" in name}
    assert loads == {kind for kind in ("space", "time") if unet.get(f"{kind}_layer", "moe") == "moe"}
    if len(loads) == 0:
        assert losses["balance"] == 0


def test_without_edge_heads_the_edge_loss_is_zero_and_a_weight_on_it_is_refused():
    losses = objective(unet={"edge_tokens": "none"}, edge_weight=0.0)(batch(range(4)), rng(range(4)))
    assert losses["edge"] == 0 and losses["loss"].isfinite()
    with pytest.raises(ValueError, match="edge_weight: got 0.1, expected 0: the preset has no edge heads"):
        objective(unet={"edge_tokens": "none"}, edge_weight=0.1)


def test_errors_are_sorted_into_quarters_of_the_timesteps():
    """Against a loop over samples. Quarters of T = 1000: to 249, to 499, to 749, to 999."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(6, 4, 3, 3, generator=generator) for _ in range(2))
    t = torch.tensor([0, 249, 250, 499, 999, 100])
    found = by_quarter(prediction, target, t, 1000)
    assert found["denoise_t.share"].tolist() == pytest.approx([3 / 6, 2 / 6, 0, 1 / 6])
    means = [0.0, 0.0, 0.0, 0.0]
    for sample, quarter in enumerate((0, 0, 1, 1, 3, 0)):
        means[quarter] += sum(float(x) ** 2 for x in (prediction - target)[sample].flatten()) / 36 / 6
    assert found["denoise_t"].tolist() == pytest.approx(means, rel=1e-5)


def test_without_weights_the_quarters_add_up_to_the_loss_and_entropies_are_shares():
    found = objective()(batch(range(6)), rng(range(6)))
    assert float(found["denoise_t"].sum()) == pytest.approx(found["denoise"].item(), rel=1e-5)
    assert float(found["denoise_t.share"].sum()) == pytest.approx(1)
    assert 0 < found["gate_entropy/space"] <= 1 and 0 < found["gate_entropy/time"] <= 1


def test_noise_offset_shifts_whole_channels_by_its_share():
    """x_t with it less x_t without is sqrt(1 - alpha_bar) * offset * one normal number a sample and channel."""
    seen = []
    for offset in (0.0, 0.1):
        goal = objective(noise_offset=offset)
        goal.unet.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
        goal(batch(range(4)), rng(range(4)))
    (plain, t), (shifted_x, same_t) = seen
    assert torch.equal(t, same_t)
    scale = (1 - goal.schedule.alpha_bar[t]).sqrt()[:, None, None, None]
    expected = scale * 0.1 * rng(range(4)).normal("noise_offset", (4, 1, 1))
    torch.testing.assert_close(shifted_x - plain, expected.float().expand_as(plain), rtol=1e-4, atol=1e-5)


def test_the_held_out_loss_is_the_square_error_at_the_asked_timestep_whatever_the_settings_of_the_training():
    place = torch.tensor([0.0, 0.3, 0.9999], dtype=torch.float64)
    goal = objective(caption_drop=1.0, noise_offset=0.5, min_snr_gamma=5.0, timestep_shift=3.0).eval()
    found = goal.heldout(batch(range(3)), rng(range(3)), place)
    assert torch.equal(found, goal.heldout(batch(range(3)), rng(range(3)), place))
    t, records, noise = torch.tensor([0, 300, 999]), batch(range(3)), rng(range(3)).normal("noise", (4, 8, 8))
    x0 = (records[MOMENTS][:, :4] - 0.1) * 2.0
    a, s = (f(goal.schedule.alpha_bar[t])[:, None, None, None].float() for f in (torch.sqrt, lambda x: (1 - x).sqrt()))
    text = encode_text(records[TOKEN_IDS])
    with torch.no_grad():
        prediction = goal.unet(a * x0 + s * noise, t, text).prediction
    expected = (prediction - (a * noise - s * x0)).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_entropy_of_a_gate_is_one_undecided_and_zero_certain():
    import math

    certain, even, mixed = [1.0, 0.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]
    probability = torch.tensor([[certain, even, mixed], [even, even, certain]])
    chosen = torch.tensor([[True, True, False], [False, False, False]])
    space = Routing(probability.argmax(-1), probability, chosen)
    assert space.entropy().tolist() == pytest.approx([0.5, 0.0])  # tokens that are left out do not count
    time = Routing(probability[0].argmax(-1), probability[0], torch.ones(3, dtype=torch.bool))
    assert time.entropy().tolist() == pytest.approx([0, 1, math.log(2) / math.log(4)])
    assert Routing(torch.zeros(2, dtype=torch.long), torch.ones(2, 1), torch.ones(2) > 0).entropy().tolist() == [0, 0]


def test_captions_that_the_records_hold_encoded_give_the_losses_of_the_encoder_and_leave_it_alone():
    """In float32, as the encoder gives them, to the bit; rounded to float16, as records have them, nearly so."""
    plain, given = batch(range(8)), batch(range(8))
    text = encode_text(given[TOKEN_IDS])
    given |= {TEXT: text.tokens, TEXT_MASK: text.mask.to(torch.uint8)}
    goal, read = objective(caption_drop=0.5), []
    expected = goal(plain, rng(range(8)))
    goal.encode_text = lambda tokens: read.append(tuple(tokens.shape)) or encode_text(tokens)
    found = goal(given, rng(range(8)))
    assert torch.equal(found["loss"], expected["loss"]) and read == [(1, SHAPE.context_length)], "the empty one, once"
    rounded = goal({**given, TEXT: text.tokens.half()}, rng(range(8)))
    torch.testing.assert_close(rounded["denoise"], expected["denoise"], rtol=1e-2, atol=1e-3)
    place = torch.linspace(0, 0.9, 8)
    goal.eval()
    assert torch.equal(goal.heldout(given, rng(range(8)), place), goal.heldout(plain, rng(range(8)), place))
