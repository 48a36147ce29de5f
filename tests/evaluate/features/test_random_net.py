"""The random network: the same everywhere, and it tells sets of scenes apart."""

import numpy as np
import pytest
import torch

from raphael.evaluate.features.random_net import DIM, RandomNet
from raphael.evaluate.features.spaces import open_network
from raphael.evaluate.metrics.neighbours import precision_recall
from raphael.evaluate.subject import Rows


@pytest.fixture(scope="module")
def drawn():
    from data_pipeline.source.scene_probe import probe_set
    from raphael.evaluate.scenes.classes import area_downsampled

    probe = probe_set(0, 120, 64, 0.12, ())
    singles = [row for row, suite in enumerate(probe.suites) if suite == "single"]
    return [area_downsampled(probe.images[row], 32) for row in singles], [probe.truths[row] for row in singles]


def test_its_features_are_a_plain_loop_of_convolutions_over_one_image():
    net, rng = RandomNet(), np.random.default_rng(0)
    image = rng.integers(0, 256, (18, 16, 3), dtype=np.uint8)
    x, told = image.astype(np.float64).transpose(2, 0, 1) / 127.5 - 1, []
    for index in range(3):
        weight = getattr(net, f"weight{index}").double().numpy()
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        rows, columns = range(0, padded.shape[1] - 2, 2), range(0, padded.shape[2] - 2, 2)
        patches = [[padded[:, i : i + 3, j : j + 3] for j in columns] for i in rows]
        x = np.array([[[max(0.0, (w * patch).sum()) for patch in row] for row in patches] for w in weight])
        told += [x.mean((1, 2)), x.reshape(len(x), -1).std(1, ddof=1)]
    expected = np.concatenate(told) @ net.directions.double().numpy()
    assert net(torch.from_numpy(image[None])).numpy()[0] == pytest.approx(expected, abs=1e-4)


def test_it_is_the_same_network_each_time_and_its_name_says_that_it_is_random():
    one, other = open_network("random"), open_network("random")
    assert one.network == other.network and one.kind == "random" and one.name == f"fd_random{DIM}"
    assert one.name_of("recall") == "recall_random64" and one.metric(200) == "fd_random64_200"


def test_other_scenes_of_the_same_kind_are_nearer_than_half_the_shapes_or_noise(drawn):
    images, truths = drawn
    network = open_network("random")
    round_ones = [i for i, truth in zip(images, truths) if truth["objects"][0]["shape"] in ("circle", "heart", "star")]
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    grey = [np.uint8(np.clip(image.astype(int) // 2 + 64, 0, 255)) for image in images[:60]]
    reference = Rows(network.rows(images[60:]))

    def distance(shown):
        return Rows(network.rows(shown)).statistics().distance(reference.statistics())

    same = distance(images[:60])
    assert same < 0.6 * distance(round_ones[:25] * 2) and same < 0.3 * distance(grey) < distance(noise)
    recall = precision_recall(network.rows(images[:60]), reference.rows)["recall"]
    assert recall > 0.6 > precision_recall(network.rows(images[:4] * 15), reference.rows)["recall"]


def test_images_of_eight_pixels_have_finite_features() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    features = RandomNet()(torch.from_numpy(images))
    assert features.shape == (5, 64) and torch.isfinite(features).all() and features.std(0).min() > 0
