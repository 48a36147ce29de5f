import re

import numpy as np
import pytest

from raphael.base.config.params import load_config
from raphael.base.tracking.tracker import MlflowTracker, create_run, resolve_uri
from raphael.cli.main import main


@pytest.fixture(scope="module")
def store(tmp_path_factory, project):
    """A workspace whose SQLite store holds two tiny runs."""
    root = tmp_path_factory.mktemp("compare")
    (root / "params.yaml").write_text((project / "params.yaml").read_text())
    monkey = pytest.MonkeyPatch()
    monkey.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config(root / "params.yaml")
    for name, slope in (("fast", 0.5), ("slow <b>", 0.9)):
        run_id = create_run(config, root, name, {"slope": slope})
        tracker = MlflowTracker(resolve_uri(config, root), run_id, root / "journal.jsonl")
        for step in (64, 128, 192):
            tracker.log({"train/loss": slope ** (step / 64), "train/same": 1.0}, step)
        if slope == 0.5:
            tracker.log({"evaluate/fd_clip_9": 0.25}, 192)
        for again in (0.0, 0.1):  # measured twice at one step: the last counts, and it is no curve
            share = slope - again
            numbers = {"e/share": share, "e/share_low": share - 0.1, "e/share_high": share + 0.1}
            tracker.log(numbers, 192, again=True)
        tracker.image("samples/grid", np.full((24, 24, 3), int(200 * slope), np.uint8), 192)
        tracker.close()
    yield root
    monkey.undo()


def compare(store, *runs):
    return main(["compare", *runs, "--params", str(store / "params.yaml"), "--out", str(store / "out" / "page.html")])


def test_the_table_has_what_differs_and_only_that(store, capsys):
    assert compare(store, "fast", "slow <b>") == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line and not line.startswith("--")}
    assert rows["e/share"] == ["0.4", "[0.3,", "0.5]", "0.8", "[0.7,", "0.9]"] and "e/share_low" not in rows
    assert rows["train/loss"] == [f"{0.5**3:.6g}", f"{0.9**3:.6g}"]
    assert "evaluate/fd_clip_9" not in rows and "-- and 1 metrics that one run alone has" in text
    assert text.index("-- parameters that differ") < text.index("-- metrics that differ")
    assert rows["slope"] == ["0.5", "0.9"]
    assert "train/same" not in rows and "train.seed" not in rows


def test_the_page_is_complete_in_itself_with_curves_and_grids_side_by_side(store):
    assert compare(store, "fast", "slow <b>") == 0
    page = (store / "out" / "page.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "<script" not in page and "slow &lt;b&gt;" in page and "slow <b>" not in page
    (chart,) = re.findall(r"<h3>train/loss</h3>(<svg.*?</svg>)", page, re.S)
    assert re.findall(r"<h3>(.*?)</h3><svg", page) == ["train/loss", "train/same"] and "fd_clip_9" in page
    curves = re.findall(r'class="curve c(\d)" d="([^"]+)"', chart)
    assert [colour for colour, _ in curves] == ["0", "1"]
    assert all(len(re.findall("[ML]", path)) == 3 for _, path in curves)
    assert page.count('src="data:image/') == 2 and page.count("step 192") >= 2


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (("fast", "nobody"), "'nobody': no run in raphael of that id or name; there are"),
        (("fast",), "got 1 runs, expected 2 to 8"),
        (("fast", "fast"), "got one run twice"),
    ],
)
def test_runs_that_cannot_be_compared_are_one_clear_line(store, capsys, runs, says):
    assert compare(store, *runs) == 1
    assert says in capsys.readouterr().err


def test_without_a_tracking_store_nothing_is_made_and_the_message_says_where_it_looked(
    tmp_path, project, capsys, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text((project / "params.yaml").read_text())
    assert main(["compare", "a", "b", "--params", str(tmp_path / "params.yaml")]) == 1
    assert "mlflow.db: no tracking store there" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()
