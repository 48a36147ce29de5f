import math

import numpy as np
import pytest
import torch
from torch import nn

from raphael.base.randomness import SampleRng
from raphael.objectives.contrastive import ContrastiveObjective, contrastive_loss, retrieval


def embeddings(count=5, width=3):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, width, generator=generator) for _ in range(2))


def test_the_loss_against_a_naive_loop():
    images, texts = embeddings()
    scale = 7.0
    total = 0.0
    for i in range(5):
        for a, b in ((images, texts), (texts, images)):
            cosines = [float(a[i] @ b[j] / (a[i].norm() * b[j].norm())) for j in range(5)]
            total += -scale * cosines[i] + math.log(sum(math.exp(scale * cosine) for cosine in cosines))
    loss, _ = contrastive_loss(images, texts, torch.tensor(math.log(scale)))
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)


def test_matching_pairs_are_found_and_shuffled_ones_are_not():
    rows = torch.eye(6)
    loss, accuracy = contrastive_loss(rows, rows, torch.tensor(math.log(50.0)))
    assert float(loss) < 1e-6 and float(accuracy) == 1
    _, accuracy = contrastive_loss(rows, rows.roll(1, 0), torch.tensor(0.0))
    assert float(accuracy) == 0


def test_the_temperature_stops_at_one_hundred_and_has_no_gradient_beyond():
    images, texts = embeddings()
    log_scale = torch.tensor(9.0, requires_grad=True)
    loss, _ = contrastive_loss(images, texts, log_scale)
    loss.backward()
    torch.testing.assert_close(loss.detach(), contrastive_loss(images, texts, torch.tensor(math.log(100.0)))[0])
    assert float(log_scale.grad) == 0


def test_retrieval_counts_in_groups():
    rows = torch.eye(8)
    found = retrieval(rows, rows, 4)
    assert found == {"image_to_text": 1.0, "text_to_image": 1.0, "chance": 0.25, "pairs": 8}
    swapped = rows[[1, 0, 2, 3, 4, 5, 6, 7]]
    assert retrieval(rows, swapped, 4)["image_to_text"] == 0.75
    assert retrieval(rows[:3], rows[:3], 64)["pairs"] == 3


class Pair(nn.Module):
    """A CLIP of two linear maps."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(12, 4), nn.Embedding(9, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, pixels):
        return self.image(pixels.flatten(1))

    def encode_text(self, ids):
        return self.text(ids).mean(dim=1)


def test_the_objective_learns_pairs_and_trains_all_of_the_clip():
    torch.manual_seed(0)
    objective = ContrastiveObjective(Pair(), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    generator = np.random.default_rng(0)
    batch = {
        "image": torch.from_numpy(generator.integers(0, 256, (8, 2, 2, 3), np.uint8)),
        "token_ids": torch.arange(8, dtype=torch.int32)[:, None],
    }
    optimizer = torch.optim.AdamW(objective.parameters(), 0.05)
    for _ in range(60):
        values = objective(batch, SampleRng(0, 0, np.arange(8)))
        optimizer.zero_grad()
        values["loss"].backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())
        optimizer.step()
    assert float(values["accuracy"]) == 1 and set(values) == {"loss", "accuracy", "scale"}


def test_mismatched_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"expected two of \(B, D\)"):
        contrastive_loss(torch.zeros(2, 3), torch.zeros(3, 3), torch.tensor(0.0))
