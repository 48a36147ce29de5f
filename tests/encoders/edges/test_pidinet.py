import warnings

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from raphael.encoders.edges.detectors import edge_map
from raphael.encoders.edges.pidinet import KINDS, PiDiNet, edge_probability, load_pidinet, plain_kernel
from raphael.encoders.pretrained import PretrainedError

CLOCKWISE = [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0)]
RAYS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


@pytest.fixture(scope="module")
def weights(shared_data):
    torch.set_num_threads(1)
    return shared_data / "weights/pidinet/table5_pidinet-tiny.pth"


@pytest.fixture(scope="module")
def photograph(shared_data):
    with Image.open(shared_data / "coco/train2017/000000030752.jpg") as image:
        return np.asarray(image.convert("RGB"))


def windows(x, side):
    """(I, H, W) -> (I, side, side, H, W): what lies around every pixel, zeros beyond the border."""
    channels, height, width = x.shape
    return F.unfold(x[None], side, padding=side // 2).view(channels, side, side, height, width)


def pixel_differences(kind, x, weight):
    """The definition (arXiv 2108.07009, section 3.1): differences of pixels, then the weighted sum. x (I, H, W)."""
    out = torch.zeros(len(weight), *x.shape[1:], dtype=x.dtype)
    if kind == "rd":
        near = windows(x, 5)
        for place, (dy, dx) in enumerate(RAYS, 1):  # the checkpoints leave place 0 unused
            ray = near[:, 2 + 2 * dy, 2 + 2 * dx] - near[:, 2 + dy, 2 + dx]
            out += torch.einsum("oi,ihw->ohw", weight.flatten(2)[..., place], ray)
        return out
    near = windows(x, 3)
    for y in range(3):
        for column in range(3):
            term = near[:, y, column].clone()
            if kind == "cd":
                term -= near[:, 1, 1]
            elif kind == "ad":
                if (y, column) == (1, 1):
                    continue
                after = CLOCKWISE[(CLOCKWISE.index((y, column)) + 1) % 8]
                term -= near[:, after[0], after[1]]
            out += torch.einsum("oi,ihw->ohw", weight[:, :, y, column], term)
    return out


@pytest.mark.parametrize("kind", ["cv", "cd", "ad", "rd"])
def test_a_converted_convolution_equals_the_one_over_differences_of_pixels(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    kernel = plain_kernel(kind, weight)
    assert kernel.shape[2:] == ((5, 5) if kind == "rd" else (3, 3))
    plain = F.conv2d(x[None], kernel, padding=kernel.shape[-1] // 2)[0]
    torch.testing.assert_close(plain, pixel_differences(kind, x, weight), rtol=0, atol=1e-12)


def test_a_difference_of_another_kind_or_shape_is_refused():
    with pytest.raises(ValueError, match="difference: got 'xd', expected cv, cd, ad or rd"):
        plain_kernel("xd", torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"weight: got shape \(1, 1, 5, 5\), expected \(O, I, 3, 3\)"):
        plain_kernel("cd", torch.zeros(1, 1, 5, 5))


def test_a_loaded_network_holds_the_file_s_weights_converted_and_every_other_as_it_is(weights):
    stored = torch.load(weights, weights_only=True)["state_dict"]
    loaded, changed = load_pidinet(weights).state_dict(), []
    assert sorted(loaded) == sorted(name.removeprefix("module.") for name in stored)
    for name, value in stored.items():
        mine = loaded[name.removeprefix("module.")]
        if mine.shape != value.shape or not torch.equal(mine, value):
            changed.append(name)
    differences = [name for name in stored if "init_block" in name or ".conv1.weight" in name and "block" in name]
    assert changed == [name for name, kind in zip(differences, KINDS, strict=True) if kind != "cv"]


@pytest.mark.parametrize("size", ["", "-tiny"])
def test_edges_of_a_photograph_lie_where_its_gradients_are_strong(shared_data, photograph, size):
    network = load_pidinet(shared_data / f"weights/pidinet/table5_pidinet{size}.pth")
    (edges,) = edge_probability(network, photograph[None, ::2, ::2])
    smooth = cv2.GaussianBlur(np.ascontiguousarray(photograph[::2, ::2]), (0, 0), 1.5).astype(np.float32)
    gradients = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)).max(-1)
    assert np.corrcoef(edges.ravel(), gradients.ravel())[0, 1] > 0.6
    assert edges[gradients > np.quantile(gradients, 0.95)].mean() > 10 * edges[gradients < np.median(gradients)].mean()


def test_with_the_kinds_of_difference_in_another_order_the_same_weights_see_less(weights, photograph, monkeypatch):
    """The order is not in the file: this is the evidence that it is the one they were trained in."""
    small = np.ascontiguousarray(photograph[::2, ::2])
    smooth = cv2.GaussianBlur(small, (0, 0), 1.5).astype(np.float32)
    gradients = np.hypot(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)).max(-1)

    def correlation(order):
        monkeypatch.setattr("raphael.encoders.edges.pidinet.KINDS", tuple(order) * 4)
        return np.corrcoef(edge_probability(load_pidinet(weights), small[None]).ravel(), gradients.ravel())[0, 1]

    true = correlation(("cd", "ad", "rd", "cv"))
    for other in (("ad", "cd", "rd", "cv"), ("cd", "rd", "ad", "cv"), ("cv",) * 4):
        assert correlation(other) < true - 0.1


def test_an_image_of_one_colour_has_next_to_no_edges(weights):
    plain = np.stack([np.full((64, 64, 3), colour, np.uint8) for colour in ((0,) * 3, (77, 140, 30), (255,) * 3)])
    edges = edge_probability(load_pidinet(weights), plain)
    assert edges.shape == (3, 64, 64) and edges.mean() < 0.02 and edges.max() < 0.25
    assert not edge_map(plain, 8, "pidinet", 0.3, weights).any()


def test_edge_maps_are_cut_at_the_threshold_or_kept_as_probabilities(weights, photograph):
    picture = photograph[None, 40:360:2, 180:460:2]
    assert not picture.flags.owndata  # a view, as a loader may hand over; never written to
    (probability,) = edge_probability(load_pidinet(weights), picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft, hard = (edge_map(picture, picture.shape[1:3], "pidinet", cut, weights)[0] for cut in (0.0, 0.5))
    assert np.array_equal(soft, np.uint8((probability * 255).round())) and len(np.unique(soft)) > 50
    assert np.array_equal(hard == 255, probability >= 0.5) and set(np.unique(hard)) == {0, 255}
    both = edge_map(np.concatenate([picture, picture[:, ::-1]]), (20, 20), "pidinet", 0.0, weights)
    assert np.array_equal(both[:1], edge_map(picture, (20, 20), "pidinet", 0.0, weights))
    assert edge_map(picture[:0], 8, "pidinet", 0.3, weights).shape == (0, 8, 8)


def test_what_cannot_be_a_checkpoint_or_an_image_is_one_line(tmp_path, weights):
    with pytest.raises(PretrainedError, match="is no file here; expected a checkpoint of .*set encode.edge_weights"):
        load_pidinet(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"state_dict": {"init_block.weight": torch.zeros(20, 3, 3, 3)}}, tmp_path / "half.pth")
    torch.save({"state_dict": {}, "more": tmp_path}, tmp_path / "unsafe.pth")  # holds an object: never unpickled
    for name in ("text", "half", "unsafe"):
        with pytest.raises(PretrainedError, match=f"{name}.pth: cannot be loaded") as error:
            load_pidinet(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got images of 7 x 20 px, expected at least 8"):
        edge_probability(PiDiNet(4, 2), np.zeros((1, 7, 20, 3), np.uint8))
