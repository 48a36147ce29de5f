import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from truth.toy_training import LOOP

from raphael.base.randomness import SampleRng
from raphael.objectives.adversarial import AdversarialLoss, PatchDiscriminator
from raphael.objectives.autoencoding import AutoencodingObjective
from raphael.train.loop import train


class Small(nn.Module):
    """An autoencoder of two convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.down, self.up = nn.Conv2d(3, 4, 4, stride=4), nn.ConvTranspose2d(2, 3, 4, stride=4)

    def encode_moments(self, images):
        return self.down(images)

    def decode_raw(self, latents):
        return self.up(latents)

    @property
    def last_layer(self):
        return self.up.weight


def adversarial(weight=0.5, start_images=0):
    torch.manual_seed(2)
    return AdversarialLoss(weight, start_images, channels=4, layers=2)


def objective(**settings):
    return AutoencodingObjective(Small(), 1e-3, 0.5, adversarial=adversarial(**settings))


def batch(indices=range(4)):
    pictures = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    return {"image": torch.from_numpy(pictures[list(indices)])}


def rng(indices=range(4)):
    return SampleRng(0, 0, np.array(indices))


def test_both_losses_are_those_of_the_paper_and_balanced_by_the_gradients_of_the_last_layer():
    mine, want = objective(), {}
    values = mine(batch(), rng())
    gradients = dict(zip(names(mine), torch.autograd.grad(values["loss"], list(mine.parameters())), strict=True))

    plain = AutoencodingObjective(Small(), 1e-3, 0.5)  # the same weights and noise, without the adversary
    images = batch()["image"].permute(0, 3, 1, 2) / 127.5 - 1
    mean, log_variance = plain.autoencoder.encode_moments(images).chunk(2, dim=1)
    noise = rng().normal("posterior", mean.shape[1:])
    drawn = plain.autoencoder.decode_raw(mean + (log_variance / 2).exp() * noise)
    judge = adversarial().discriminator
    generator = -judge(drawn).mean()
    rest = plain(batch(), rng())
    reconstruction = rest["loss"] - 1e-3 * rest["kl"]  # the KL does not reach the last layer
    of_rest, of_generator = (
        torch.autograd.grad(loss, plain.autoencoder.up.weight, retain_graph=True)[0]
        for loss in (reconstruction, generator)
    )
    balance = float(0.5 * of_rest.norm() / (of_generator.norm() + 1e-4))
    assert float(values["adversarial_balance"]) == pytest.approx(balance, rel=1e-5)
    want["autoencoder"] = torch.autograd.grad(
        rest["loss"] + balance * generator, list(plain.parameters()), retain_graph=True
    )
    hinge = 0.5 * ((1 - judge(images)).clamp(min=0).mean() + (1 + judge(drawn.detach())).clamp(min=0).mean())
    want["judge"] = torch.autograd.grad(hinge, list(judge.parameters()))
    torch.testing.assert_close(values["discriminator"], hinge.detach())
    for name, true in zip(names(plain), want["autoencoder"], strict=True):
        torch.testing.assert_close(gradients[name], true, rtol=1e-4, atol=1e-6)
    for name, true in zip(names(judge), want["judge"], strict=True):
        torch.testing.assert_close(gradients[f"adversarial.discriminator.{name}"], true)


def names(module):
    return [name for name, _ in module.named_parameters()]


def test_before_its_start_the_adversary_neither_teaches_nor_learns():
    late, plain = objective(start_images=8), AutoencodingObjective(Small(), 1e-3, 0.5)
    for step in range(3):
        values, alone = late(batch(), rng()), plain(batch(), rng())
        judge = torch.autograd.grad(values["loss"], list(late.adversarial.parameters()), retain_graph=True)
        began = step == 2  # after 8 images
        assert (not torch.equal(values["loss"], alone["loss"])) == began
        assert any(bool(gradient.any()) for gradient in judge) == began
    late.eval()
    late(batch(), rng())
    assert int(late.adversarial.images_seen) == 12  # a held-out loss counts for nothing


def test_an_image_is_judged_alike_beside_any_other():
    judge = PatchDiscriminator(4, 3).double()
    pictures = torch.rand(3, 3, 24, 32, dtype=torch.float64)
    torch.testing.assert_close(judge(pictures)[1:2], judge(pictures[1:2]), rtol=0, atol=1e-12)
    assert judge(pictures).shape == (3, 1, 1, 2)
    with pytest.raises(ValueError, match="got images or crops of 16 x 16 px, expected sides of at least 24"):
        judge(torch.zeros(1, 3, 16, 16))


class Pictures:
    def __len__(self):
        return 8

    def batch(self, indices):
        return {"image": batch(indices)["image"].numpy()}


def test_a_training_with_an_adversary_goes_on_to_the_bit(tmp_path):
    loop = replace(LOOP, num_images=48, batch_size=4, checkpoint_every_images=24, sample_every_images=0)

    def weights(folder, *stops):
        made = objective(start_images=16)
        for images in stops:
            made = objective(start_images=16)
            ends = replace(loop, num_images=images, schedule="constant")
            train(made, Pictures(), ends, 0, folder=folder)
        return made.state_dict()

    once, twice = weights(tmp_path / "once", 48), weights(tmp_path / "twice", 24, 48)
    assert int(once["adversarial.images_seen"]) == 48
    assert all(torch.equal(once[name], twice[name]) for name in once)


WORKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
from objectives.test_adversarial import batch, objective, rng
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
mine, part = objective(), range(2 * rank, 2 * rank + 2)
values = mine(batch(part), rng(part))
print(float(values["adversarial_balance"]), int(mine.adversarial.images_seen))
torch.distributed.destroy_process_group()
"""


def test_two_workers_find_the_balance_of_the_whole_batch():
    from raphael.base.ray_cluster import free_ports

    whole = objective()(batch(), rng())["adversarial_balance"]
    (port,) = free_ports(1)
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tests = Path(__file__).resolve().parents[1]
    common["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent)])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tests)],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        told, _ = worker.communicate(timeout=120)
        balance, images = told.split()
        assert float(balance) == pytest.approx(float(whole), rel=1e-5) and int(images) == 4
