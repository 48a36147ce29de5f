import math
import random
import re

import pytest
import yaml

from data_pipeline.encode.buckets import AREA_256_PX, DEBUG_PX, RAPHAEL_PX, nearest_size, size_name
from raphael.base.config.data import PictureConfig
from raphael.base.config.preset import load_preset


def nearest_by_logarithms(height, width, sizes):
    """Every distance written out; the first of those that no other one is below by more than rounding."""
    distances = [abs(math.log(height / width) - math.log(h / w)) for h, w in sizes]
    return [index for index, distance in enumerate(distances) if distance <= min(distances) + 1e-12][0]


@pytest.mark.parametrize("sizes", [RAPHAEL_PX, AREA_256_PX, DEBUG_PX, RAPHAEL_PX[::-1], ((64, 64),)])
def test_an_image_goes_to_the_size_nearest_on_a_logarithmic_scale(sizes):
    rng = random.Random(0)
    for _ in range(1000):
        height, width = rng.randint(1, 3000), rng.randint(1, 3000)
        assert nearest_size(height, width, sizes) == nearest_by_logarithms(height, width, sizes)


def test_an_image_of_a_buckets_own_shape_goes_there_at_any_scale():
    for index, (height, width) in enumerate(RAPHAEL_PX):
        assert {nearest_size(height * k // 2, width * k // 2, RAPHAEL_PX) for k in (1, 2, 3)} == {index}


@pytest.mark.parametrize(("height", "width"), [(7, 7), (100, 100), (1999, 1999)])
def test_of_two_equally_near_sizes_the_first_in_the_list_is_taken(height, width):
    """9/10 and 10/9 are as far from a square; their logarithms differ in the last bit."""
    sizes = ((576, 640), (640, 576))
    assert nearest_size(height, width, sizes) == nearest_size(height, width, sizes[::-1]) == 0


def test_very_long_and_very_tall_images_go_to_the_outermost_sizes():
    assert RAPHAEL_PX[nearest_size(100, 100_000, RAPHAEL_PX)] == (448, 832)
    assert RAPHAEL_PX[nearest_size(100_000, 100, RAPHAEL_PX)] == (832, 448)


@pytest.mark.parametrize(
    ("sizes", "preset"), [(RAPHAEL_PX, "raphael-3b"), (AREA_256_PX, "small"), (DEBUG_PX, "tiny-debug")]
)
def test_the_sets_fit_the_presets_they_are_for_and_no_shape_comes_twice(sizes, preset):
    loaded = load_preset(preset)
    multiple = 2 ** (len(loaded.vae.channels) + len(loaded.unet.channels) - 2)
    assert all(side % multiple == 0 for size in sizes for side in size)
    assert PictureConfig(sizes).sizes_px == sizes
    assert {(width, height) for height, width in sizes} == set(sizes)  # lying and standing images are served alike


def test_the_papers_nine_are_those_of_the_paper_presets_and_of_the_documentation(project):
    for preset in ("sd", "raphael-3b"):
        assert load_preset(preset).sizes_px == RAPHAEL_PX
    text = (project / "docs/data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    documented = [tuple(map(tuple, block["picture"]["sizes_px"])) for block in blocks if "picture" in block]
    assert documented == [RAPHAEL_PX, AREA_256_PX]


def test_a_buckets_name_says_height_first():
    assert size_name((448, 832)) == "448x832"
