"""Muon against a decomposition, against its formula matrix by matrix, and through a checkpoint."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from truth.toy_training import LOOP

from raphael.base.checkpoint.folder import Stored, write_checkpoint
from raphael.train.optim.muon import Muon, is_muon_shape, orthogonalised, owners
from raphael.train.optim.optimizer import make_optimizer
from raphael.train.state import State

MUON = replace(LOOP, optimizer="muon", learning_rate=0.01, weight_decay=0.1)


class Experts(nn.Module):
    decayed = ("w1",)

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(3, 64, 32))
        self.b1 = nn.Parameter(torch.zeros(3, 64))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.square = nn.Linear(48, 32), nn.Linear(32, 32)
        self.conv, self.experts = nn.Conv2d(32, 40, 3), Experts()
        self.narrow, self.norm = nn.Linear(32, 4), nn.LayerNorm(32)


def give_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("shape", [(32, 32), (40, 90), (90, 40)])
def test_singular_values_end_near_one_and_singular_vectors_stay(shape):
    matrix = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    u, s, vh = torch.linalg.svd(matrix[0], full_matrices=False)
    core = u.T @ orthogonalised(matrix)[0].float() @ vh.T  # diagonal where the vectors are the same
    diagonal = core.diagonal()
    large = s > 0.1 * s[0]
    assert diagonal[large].min() > 0.6 and diagonal[large].max() < 1.3
    assert (core - diagonal.diag()).abs().max() < 0.05


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(orthogonalised(torch.zeros(2, 32, 40)), torch.zeros(2, 32, 40, dtype=torch.bfloat16))


def naive_newton_schulz(matrix):
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    return x


def test_five_steps_are_the_formula_matrix_by_matrix():
    weights = [nn.Parameter(torch.randn(*shape)) for shape in ((32, 48), (32, 48), (40, 32, 3, 3), (3, 64, 32))]
    truths = [weight.detach().double().clone() for weight in weights]
    momenta = [torch.zeros_like(truth) for truth in truths]
    optimizer = Muon([{"params": weights, "weight_decay": 0.1}], lr=0.01)
    for step in range(5):
        for i, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(10 * step + i))
            g = weight.grad.double()
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            update = 0.05 * g + 0.95 * momenta[i]
            matrices = update if update.ndim == 3 else update.reshape(1, len(update), -1)
            u = torch.stack([naive_newton_schulz(matrix) for matrix in matrices]).reshape(update.shape)
            truths[i] = truths[i] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(matrices.shape[1:]) ** 0.5 * u
        optimizer.step()
    for weight, truth in zip(weights, truths, strict=True):
        moved = 5 * 0.01 * 0.2  # about: an update's entry has a root mean square of 0.2 eta
        assert (weight.double() - truth).square().mean().sqrt() < 0.02 * moved


def test_an_update_is_as_large_as_adamws():
    weight = nn.Parameter(torch.zeros(96, 200))
    weight.grad = torch.randn(96, 200, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0).step()
    assert weight.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_matrices_go_to_muon_and_all_else_to_adamw():
    net = Net()
    muon, adamw = make_optimizer(net, MUON).optimizers
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    owned = [{names[id(p)] for group in opt.param_groups for p in group["params"]} for opt in (muon, adamw)]
    assert owned[0] == {"wide.weight", "square.weight", "conv.weight", "experts.w1"}
    assert owned[1] == set(names.values()) - owned[0]
    assert len(make_optimizer(nn.LayerNorm(4), MUON).optimizers) == 1


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_owners_share_the_cost_evenly(workers):
    shapes = [(96, 64, 3, 3), (96, 96, 3, 3), (4, 192, 96), (4, 96, 192), (96, 96), (288, 96)] * 4
    parameters = [torch.empty(shape) for shape in shapes]
    found = owners(parameters, workers)
    costs = []
    for parameter in parameters:
        n, rows, columns = naive_stack(parameter)
        m, k = min(rows, columns), max(rows, columns)
        costs.append(n * (4 * m * m * k + 2 * m**3))
    work = [sum(cost for cost, owner in zip(costs, found, strict=True) if owner == one) for one in range(workers)]
    assert max(work) <= sum(costs) / workers + max(costs)  # Graham's bound of list scheduling


def naive_stack(parameter):
    if parameter.ndim == 3:
        return tuple(parameter.shape)
    return 1, len(parameter), parameter[0].numel()


def test_a_narrow_parameter_is_refused():
    assert not is_muon_shape(torch.zeros(4, 64)) and not is_muon_shape(torch.zeros(64))
    with pytest.raises(ValueError, match=r"\[4, 64\]; give it to AdamW"):
        Muon([nn.Parameter(torch.zeros(4, 64))], lr=0.1)


def test_a_parameter_without_gradient_stays():
    weight = nn.Parameter(torch.ones(32, 32))
    Muon([{"params": [weight], "weight_decay": 1.0}], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.ones(32, 32))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_going_on_from_a_checkpoint_is_bit_for_bit_never_having_stopped(tmp_path, order, optimizer):
    loop = replace(MUON, optimizer=optimizer)
    through = Net().to(memory_format=order)
    state = State(through, loop, {})
    for seed in range(3):
        give_gradients(through, seed)
        state.optimizer.step()
    groups, meta = state.pack()
    write_checkpoint(tmp_path / "c", groups, meta)
    kept = "momentum" if optimizer == "muon" else "exp_avg"
    assert {f"wide.weight.{kept}", "norm.weight.exp_avg"} <= set(groups["optimizer"])
    later = Net().to(memory_format=order)
    resumed = State(later, loop, {})
    resumed.unpack(Stored(tmp_path / "c"), "here")
    for module, at in ((through, state), (later, resumed)):
        give_gradients(module, 9)
        at.optimizer.step()
    for a, b in zip(through.parameters(), later.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_order_in_memory_changes_nothing():
    convolutions = [nn.Conv2d(32, 40, 3), nn.Conv2d(32, 40, 3)]
    convolutions[1].load_state_dict(convolutions[0].state_dict())
    convolutions[1].to(memory_format=torch.channels_last)
    for convolution in convolutions:
        gradient = torch.randn(40, 32, 3, 3, generator=torch.Generator().manual_seed(0))
        convolution.weight.grad = gradient.clone(memory_format=torch.preserve_format).to(
            memory_format=torch.channels_last if convolution is convolutions[1] else torch.contiguous_format
        )
        Muon([convolution.weight], lr=0.1).step()
    torch.testing.assert_close(convolutions[0].weight, convolutions[1].weight, rtol=0, atol=2e-4)
