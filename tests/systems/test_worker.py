"""What a training shows of itself: grids, by each kind of weights."""

from types import SimpleNamespace

from PIL import Image

from raphael.base.tracking.tracker import NullTracker
from raphael.systems.worker import sample


def test_at_the_beginning_all_weights_are_the_same_and_their_grid_is_generated_once(tmp_path):
    made = []

    def grid():
        made.append(len(made))
        return Image.new("RGB", (4, 4), (len(made), 0, 0))

    job = SimpleNamespace(folders=SimpleNamespace(samples=tmp_path))
    first = []
    for when in ((0, "ema"), (0, "raw"), (480, "ema"), (480, "raw")):
        sample(job, SimpleNamespace(grid=grid), NullTracker(), True, when, first)
    assert len(made) == 3
    red = {file: Image.open(tmp_path / file).getpixel((0, 0))[0] for file in ("000000.png", "raw/000000.png")}
    assert set(red.values()) == {1}
    assert Image.open(tmp_path / "000480.png").getpixel((0, 0))[0] == 2
    assert Image.open(tmp_path / "raw/000480.png").getpixel((0, 0))[0] == 3
