"""The preference study: the page in a real browser, what it must not tell, and the tally against counts by hand."""

import csv
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from raphael.base.stage import read_json, write_json
from raphael.cli.main import main
from raphael.evaluate.studies.preference_tally import shares

PROMPTS = [f'thing {number}, "quoted" & <b>bold</b> </script>' for number in range(5)]

# Presses keys as a person would; reloads once in the middle, so the second half starts from what the browser kept.
HARNESS = """
<script>
const id = (name) => document.getElementById(name);
const press = (key, more = {}) =>
  document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, ...more}));
const start = () => { id("rater").value = 'Ann "A"'; document.querySelector("form").requestSubmit(); };
let saved;
URL.createObjectURL = (blob) => { saved = blob; return "#"; };
if (!localStorage.getItem("halfway")) {
  press("ArrowLeft");                       // before the start: nothing
  start();
  for (const key of ["ArrowLeft", "ArrowDown", "ArrowRight", "ArrowRight", "1"]) press(key);
  press("ArrowRight", {repeat: true});      // a held key: nothing
  press("x");
  press("Backspace"); press("Backspace");   // back to the second question of the second item
  press("ArrowDown"); press("3");
  localStorage.setItem("halfway", "yes");
  location.reload();
} else {
  const resumed = id("rater").value;
  start();
  const question = document.querySelector("fieldset.active legend").textContent, at = id("place").textContent;
  document.querySelectorAll("fieldset.active button")[1].click();
  for (const key of ["2", "ArrowLeft", "ArrowDown"]) press(key);
  const images = [...document.querySelectorAll("figure img")];
  Promise.all(images.map((image) => image.decode())).then(() => {
  const shown = images.map((image) => image.naturalWidth);
  press("ArrowRight"); press("Enter");
  saved.text().then((text) => {
    const facts = {text, resumed, at, question, shown, done: !id("done").hidden};
    const pre = Object.assign(document.createElement("pre"), {id: "facts", textContent: JSON.stringify(facts)});
    document.body.replaceChildren(pre);
  }); });
}
</script>
"""


def draw(folder, prompts=PROMPTS, each=2, seed=0, text=""):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    entries = []
    for prompt in prompts:
        for _ in range(each):
            name = f"{len(entries):03d}.png"
            note = PngImagePlugin.PngInfo()
            note.add_text("model", text)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name, pnginfo=note)
            entries.append({"file": name, "prompt": prompt, "index": len(entries), "suite": prompt[:7]})
    write_json(folder / "images.json", {"images": entries})
    return folder


def make(tmp_path, *more, out="study"):
    return main(
        [
            "prefer",
            "make",
            "--a",
            str(tmp_path / "secretA"),
            "--b",
            str(tmp_path / "secretB"),
            "--out",
            str(tmp_path / out),
        ]
        + list(more)
    )


@pytest.fixture
def study(tmp_path):
    draw(tmp_path / "secretA", text="secretA"), draw(tmp_path / "secretB", seed=1, text="secretB")
    assert make(tmp_path) == 0
    return tmp_path / "study"


def content_of(page):
    return json.loads(re.search(r'id="content">(.*?)</script>', page, re.S).group(1))


def test_the_page_is_answered_by_keyboard_in_a_real_browser_and_remembers(study, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium on PATH: the page is not driven in a browser")
    page = (study / "index.html").read_text(encoding="utf-8")
    (study / "driven.html").write_text(page.replace("</body>", HARNESS + "</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=60000"]
    command = [
        browser,
        *options,
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        f"file://{study}/driven.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="facts">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads(html.unescape(found.group(1)))
    assert facts["done"] and facts["resumed"] == 'Ann "A"'
    assert facts["at"] == "3 of 5" and facts["question"].startswith("Which better")
    assert facts["shown"] == [8, 8, 8, 8]  # the images of the last item, all loaded under the page's own rules
    rows = list(csv.DictReader(facts["text"].splitlines()))
    items = content_of(page)["items"]
    assert [row["item"] for row in rows] == [item["id"] for item in items] and len(rows) == 5
    assert {row["rater"] for row in rows} == {'Ann "A"'}
    given = [(row["quality"], row["alignment"]) for row in rows]
    assert given == [("left", "tie"), ("right", "tie"), ("right", "tie"), ("tie", "left"), ("tie", "right")]
    assert all(float(row["seconds"]) >= 0 for row in rows)

    (tmp_path / "ann.csv").write_text(facts["text"], encoding="utf-8")
    key = read_json(tmp_path / "study.key.json")
    assert main(["prefer", "tally", str(tmp_path / "ann.csv"), "--key", str(tmp_path / "study.key.json"),
                 "--out", str(tmp_path / "out")]) == 0  # fmt: skip
    (summary,) = read_json(tmp_path / "out" / "preference.json")
    for place, question in enumerate(("quality", "alignment")):
        chosen = [
            key["items"][row["item"]].get(answers[place], "tie") for row, answers in zip(rows, given, strict=True)
        ]
        for choice in ("a", "tie", "b"):
            assert summary["questions"][question][choice]["share"] == pytest.approx(chosen.count(choice) / 5)
    with Image.open(tmp_path / "out" / "preference.png") as chart:
        assert chart.width > 300


def test_nothing_that_raters_get_tells_the_models_apart(study, tmp_path):
    files = [path for path in study.rglob("*") if path.is_file()]
    assert len(files) == 1 + 20
    for path in files:
        for secret in (b"secretA", b"secretB", b"key.json"):
            assert secret not in path.read_bytes() and secret.decode() not in path.name
    page = (study / "index.html").read_text(encoding="utf-8")
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page
    key = read_json(tmp_path / "study.key.json")
    lefts = [sides["left"] for sides in key["items"].values()]
    assert sorted((lefts.count("a"), lefts.count("b"))) == [2, 3]
    assert [item["prompt"] for item in content_of(page)["items"]] != PROMPTS  # seed 0 does shuffle these


def test_the_key_says_whose_images_stand_where_and_the_seed_decides_it(study, tmp_path):
    key = read_json(tmp_path / "study.key.json")
    for item in content_of((study / "index.html").read_text(encoding="utf-8"))["items"]:
        for side in ("left", "right"):
            folder = tmp_path / {"a": "secretA", "b": "secretB"}[key["items"][item["id"]][side]]
            entries = [e for e in read_json(folder / "images.json")["images"] if e["prompt"] == item["prompt"]]
            for file, entry in zip(item[side], entries, strict=True):
                assert np.array_equal(
                    np.asarray(Image.open(study / file)), np.asarray(Image.open(folder / entry["file"]))
                )
    assert make(tmp_path, out="again") == 0 and make(tmp_path, "--seed", "1", out="other") == 0
    same, other = read_json(tmp_path / "again.key.json"), read_json(tmp_path / "other.key.json")
    assert same == key and other["study"] != key["study"]


def test_a_tally_by_hand():
    """Two items, three raters: a, a, b and tie, a, a."""
    given = [("x", "1", "a"), ("x", "2", "a"), ("x", "3", "b"), ("y", "1", "tie"), ("y", "2", "a"), ("y", "3", "a")]
    found = shares(given)
    assert [found[choice]["share"] for choice in ("a", "tie", "b")] == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert found["lead"]["share"] == pytest.approx(3 / 6) and found["agreement"] == pytest.approx(2 / 6)
    # the resamples of two items are xx, xy, yx, yy; a has 2/3 in both, so its interval is a point
    assert found["a"]["low"] == pytest.approx(4 / 6) == found["a"]["high"]
    # b has 1/3 in x and 0 in y: percentiles 0 and 1/3 about 1/6, widened by sqrt(2)
    assert found["b"]["high"] == pytest.approx(1 / 6 + 2**0.5 / 6) and found["b"]["low"] == 0.0


def test_what_cannot_be_a_study_or_a_result_is_one_clear_line(study, tmp_path, capsys):
    def says(words, arguments):
        assert main(["prefer", *map(str, arguments)]) == 1
        assert words in capsys.readouterr().err

    a, b, key = tmp_path / "secretA", tmp_path / "secretB", tmp_path / "study.key.json"
    few = draw(tmp_path / "few", PROMPTS[:4])
    says("have images", ["make", "--a", a, "--b", few, "--out", tmp_path / "s2"])
    one = draw(tmp_path / "one", each=1)
    says("expected as many", ["make", "--a", a, "--b", one, "--out", tmp_path / "s2"])
    says("expected two", ["make", "--a", a, "--b", b, "--names", "x", "x", "--out", tmp_path / "s2"])
    says("expected it outside", ["make", "--a", a, "--b", b, "--out", study, "--key", study / "key.json"])
    says("expected an empty or a new folder", ["make", "--a", a, "--b", b, "--out", few])

    facts = read_json(key)
    items = list(facts["items"])
    lines = ["study,rater,item,quality,alignment,seconds", f"{facts['study']},R,{items[0]},left,tie,1"]
    good = f"{facts['study']},R,{items[1]},left,tie,1"
    for bad, words in (
        (f"abc,R,{items[1]},left,tie,1", "study 'abc'"),
        (f"{facts['study']},R,nobody,left,tie,1", "not of this study"),
        (f"{facts['study']},R,{items[1]},up,tie,1", "got 'up'"),
        (f"{facts['study']},R,{items[0]},left,tie,1", "in both"),
    ):
        (tmp_path / "r.csv").write_text("\n".join([*lines, bad]))
        says(words, ["tally", tmp_path / "r.csv", "--key", key])
    (tmp_path / "r.csv").write_text("\n".join([*lines, good]))
    assert main(["prefer", "tally", str(tmp_path / "r.csv"), "--key", str(key)]) == 0
