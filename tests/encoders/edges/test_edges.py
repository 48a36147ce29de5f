import numpy as np
import pytest

from raphael.encoders.edges.detectors import DETECTORS, edge_map, max_pool


def square(side=32, colour=(255, 0, 0), ground=(255, 255, 255)):
    image = np.empty((side, side, 3), np.uint8)
    image[:] = ground
    image[8:24, 8:24] = colour
    return image


def near_outline(side=32, reach=2):
    """True where a pixel lies within `reach` of the square's outline."""
    y, x = np.mgrid[:side, :side] + 0.5
    distance = np.maximum(abs(y - 16), abs(x - 16)) - 8
    return abs(distance) <= reach


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_edges_of_a_drawn_square_are_its_outline(detector):
    (edges,) = edge_map(square()[None], 32, detector, 0.3)
    assert edges.dtype == np.uint8 and set(np.unique(edges)) == {0, 255}
    assert not edges[~near_outline()].any()
    for line in (edges[8:24, 6:10].max(axis=1), edges[8:24, 22:26].max(axis=1), edges[6:10, 8:24].max(axis=0)):
        assert (line[2:-2] == 255).all()


@pytest.mark.parametrize("detector", DETECTORS)
def test_red_on_green_of_equal_brightness_is_an_edge(detector):
    (edges,) = edge_map(square(colour=(255, 0, 0), ground=(0, 130, 0))[None], 32, detector, 0.3)
    assert edges[16].any()


@pytest.mark.parametrize("detector", DETECTORS)
def test_plain_and_softly_graded_images_have_no_edges(detector):
    plain = np.full((16, 16, 3), 77, np.uint8)
    graded = np.repeat(np.arange(16, dtype=np.uint8)[:, None, None], 16, axis=1).repeat(3, axis=2) + 100
    assert not edge_map(np.stack([plain, graded]), 8, detector, 0.3).any()


def test_max_pooling_against_a_naive_loop_also_where_sides_do_not_divide():
    edges = np.random.default_rng(0).integers(0, 256, (13, 10)).astype(np.uint8)
    pooled = max_pool(edges, 4, 3)
    for i in range(4):
        for j in range(3):
            rows = [y for y in range(13) if y * 4 < (i + 1) * 13 and (y + 1) * 4 > i * 13]
            columns = [x for x in range(10) if x * 3 < (j + 1) * 10 and (x + 1) * 3 > j * 10]
            assert pooled[i, j] == max(edges[y, x] for y in rows for x in columns)
    assert max_pool(edges[:2, :2], 4, 4).tolist() == edges[:2, :2].repeat(2, 0).repeat(2, 1).tolist()


def test_a_thin_line_survives_and_oblong_maps_have_their_shape():
    image = np.zeros((64, 32, 3), np.uint8)
    image[:, 13] = 255
    edges = edge_map(image[None], (16, 8))
    assert edges.shape == (1, 16, 8) and (edges[0, :, 3] == 255).all() and not edges[0, :, 6:].any()


def test_wrong_input_says_what_was_expected():
    with pytest.raises(ValueError, match="expected uint8"):
        edge_map(np.zeros((1, 4, 4, 3), np.float32), 2)
    with pytest.raises(ValueError, match="one of sobel, canny"):
        edge_map(square()[None], 8, "laplace")
    with pytest.raises(ValueError, match="from 0 to 1"):
        edge_map(square()[None], 8, "sobel", 3.0)
