"""Adafactor in the one loop: its update against the paper's algorithm, its memory, and that it resumes."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from truth.toy_training import LOOP, ToyData, ToyObjective

from raphael.base.checkpoint.home import CheckpointHome
from raphael.train.loop import Hooks, train
from raphael.train.optim.optimizer import make_optimizer

OWN = replace(LOOP, optimizer="adafactor", learning_rate=0.02, weight_decay=0.0)


def test_the_update_of_a_matrix_is_algorithm_4_of_the_paper():
    """arXiv 1804.04235, with beta_2 = 1 - t^-0.8, d = 1, and the step min(rate, t^-1/2) max(eps_2, RMS(W))."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False).double()
    weight, rows, columns = layer.weight.detach().clone(), torch.zeros(3).double(), torch.zeros(5).double()
    optimizer = make_optimizer(layer, OWN)
    for t in range(1, 5):
        gradient = torch.randn(3, 5, dtype=torch.float64)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * gradient.square().mean(1)
        columns = beta * columns + (1 - beta) * gradient.square().mean(0)
        update = gradient / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        step = min(OWN.learning_rate, t**-0.5) * max(1e-3, float(weight.square().mean().sqrt()))
        weight = weight - step * update
        assert torch.allclose(layer.weight, weight, atol=1e-12)


def test_its_moments_are_rows_and_columns():
    module = nn.Sequential(nn.Linear(40, 30), nn.Conv2d(4, 6, 3))
    optimizer = make_optimizer(module, OWN)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(
        moment.nbytes
        for parameter in module.parameters()
        for name, moment in optimizer.moments(parameter).items()
        if name != "step"
    )
    assert held == optimizer.expected_bytes() == 4 * ((30 + 40) + 30 + 2 * 6 * 4 * 3 + 6)
    adamw = make_optimizer(module, replace(OWN, optimizer="adamw"))
    assert adamw.expected_bytes() > 5 * optimizer.expected_bytes()


def test_a_bad_step_changes_nothing():
    layer = nn.Linear(3, 3)
    optimizer = make_optimizer(layer, OWN)
    layer.weight.grad, layer.bias.grad = torch.full((3, 3), torch.nan), torch.ones(3)
    before = layer.weight.detach().clone()
    optimizer.step(torch.tensor(True))
    assert torch.equal(layer.weight, before) and not optimizer.moments(layer.weight)


def test_stopped_and_resumed_it_is_the_same_to_the_last_bit(tmp_path):
    class Stop(Exception):
        pass

    def stop(images):
        if images == 200:
            raise Stop

    whole = ToyObjective()
    train(whole, ToyData(), OWN, 7, folder=tmp_path / "whole", hooks=Hooks(say=lambda _: None))
    hooks = Hooks(say=lambda _: None, progress=stop)
    with pytest.raises(Stop):
        train(ToyObjective(), ToyData(), OWN, 7, folder=tmp_path / "parts", hooks=hooks)
    resumed = ToyObjective()
    result = train(resumed, ToyData(), OWN, 7, folder=tmp_path / "parts", hooks=Hooks(say=lambda _: None))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert result["history"][-1]["train/loss"] < result["history"][0]["train/loss"]
    stored = CheckpointHome(tmp_path / "parts").newest()[0]["optimizer"]
    assert {name.rpartition(".")[2] for name in stored} == {"step", "row_var", "col_var", "variance"}
