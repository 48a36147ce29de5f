"""What guides learn, against loops over samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from raphael.base.config.preset import DiffusionConfig
from raphael.base.randomness import SampleRng
from raphael.diffusion.noise import noise_of
from raphael.objectives.noised import NoisedClassifier, NoisedClip, class_log_p, text_log_p

ROWS = np.arange(8)
NOISE = noise_of(DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", zero_terminal_snr=True))


class Linear(nn.Module):
    """Reads x and t; keeps what it was given."""

    def __init__(self, out: int):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 4 * 4 + 1, out)

    def forward(self, x, t):
        self.given = x, t
        return self.layer(torch.cat([x.flatten(1), t[:, None] / 1000], 1))


def batch(**more):
    pixels = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"pixels": pixels, **more}


def rng() -> SampleRng:
    return SampleRng(0, 0, ROWS)


def test_a_network_is_shown_the_image_noised_at_a_timestep_of_its_own():
    objective = NoisedClassifier(Linear(5), NOISE, (2.0, 0.5))
    objective(batch(label=torch.arange(8) % 5), rng())
    x_t, t = objective.network.given
    x0 = (batch()["pixels"].float() / 127.5 - 1 - 0.5) * 2.0
    u, eps = rng().uniform("timestep"), rng().normal("noise", (3, 4, 4))
    for row in range(8):
        step = int(u[row] * 1000)
        alpha_bar = float(NOISE.alpha_bar[step])
        assert t[row] == step
        expected = math.sqrt(alpha_bar) * x0[row] + math.sqrt(1 - alpha_bar) * eps[row]
        torch.testing.assert_close(x_t[row], expected)


def test_the_classifiers_loss_is_the_mean_over_the_batch_of_those_that_have_a_label():
    objective = NoisedClassifier(Linear(5), NOISE)
    labels = torch.tensor([0, -1, 2, 4, -1, 3, 1, 0], dtype=torch.int32)
    told = objective(batch(label=labels), rng())
    logits = objective.network(*objective.network.given).double()
    terms, hits, quarters = [], [], [[] for _ in range(4)]
    for row, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        weights = [math.exp(float(value)) for value in logits[row]]
        terms.append(-math.log(weights[label] / sum(weights)))
        hits.append(weights[label] == max(weights))
        quarters[int(objective.network.given[1][row]) // 250].append(hits[-1])
    assert float(told["loss"]) == pytest.approx(sum(terms) / 8, rel=1e-5)
    assert float(told["accuracy"] / told["accuracy.share"]) == pytest.approx(sum(hits) / 6)
    for number, found in enumerate(quarters):
        assert float(told["accuracy_t.share"][number]) == pytest.approx(len(found) / 8)
        assert float(told["accuracy_t"][number]) == pytest.approx(sum(found) / 8)
    whole = batch(label=labels)
    halves = [
        objective({name: value[part] for name, value in whole.items()}, SampleRng(0, 0, ROWS[part]))["loss"]
        for part in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(halves) / 2, told["loss"])  # a mean over any split of the batch


def test_the_clips_loss_is_both_cross_entropies_of_images_and_captions_and_the_captions_stay_frozen():
    tower = nn.Embedding(50, 6)
    objective = NoisedClip(Linear(6), NOISE, lambda ids: tower(ids).sum(1))
    ids = torch.randint(0, 50, (8, 4), generator=torch.Generator().manual_seed(2))
    ids[5] = ids[2]
    told = objective(batch(token_ids=ids.int()), rng())
    images = objective.network(*objective.network.given).double()
    texts = tower(ids).sum(1).double()
    scale, cosine = math.exp(float(objective.log_scale)), [[0.0] * 8 for _ in range(8)]
    for i in range(8):
        for j in range(8):
            cosine[i][j] = float(images[i] @ texts[j] / images[i].norm() / texts[j].norm())
    loss = 0.0
    for i in range(8):
        row = [math.exp(scale * cosine[i][j]) for j in range(8)]
        column = [math.exp(scale * cosine[j][i]) for j in range(8)]
        loss -= (math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))) / 16
    assert float(told["loss"]) == pytest.approx(loss, rel=1e-5)
    right = [cosine[i][i] >= max(cosine[i]) - 1e-7 for i in range(8)]
    assert float(told["accuracy"]) == pytest.approx(sum(right) / 8)
    told["loss"].backward()
    assert tower.weight.grad is None and objective.log_scale.grad is not None
    assert objective.network.layer.weight.grad.abs().sum() > 0
    assert not any(name.startswith("encode_text") for name in objective.state_dict())


def test_at_one_timestep_hits_and_those_that_count_are_told_sample_by_sample():
    objective = NoisedClassifier(Linear(5), NOISE)
    labels = torch.tensor([0, -1, 2, 4, -1, 3, 1, 0])
    hits, known = objective.hits(batch(label=labels), rng(), 0.5)
    x_t, t = objective.network.given
    assert t.tolist() == [500] * 8 and known.tolist() == [1, 0, 1, 1, 0, 1, 1, 1]
    assert hits.bool().tolist() == (objective.network(x_t, t).argmax(1) == labels).tolist()


def test_log_p_of_a_class_and_of_a_caption():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    found = class_log_p(logits, torch.tensor([2, 1])).tolist()
    total = [1 + math.e + math.e**2, math.e**3 + 2]
    assert found == pytest.approx([2 - math.log(total[0]), -math.log(total[1])], rel=1e-12)
    images, texts = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    assert text_log_p(images, texts, 10.0).tolist() == pytest.approx([6.0, 0.0])
