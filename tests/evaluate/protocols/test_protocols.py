"""The protocols that ship: complete, readable, and fixed to the public lists they name."""

import json

import pytest

from raphael.base.stage import StageError
from raphael.base.strict import ConfigError
from raphael.evaluate.features.image_folder import ImageFolder
from raphael.evaluate.features.spaces import Network
from raphael.evaluate.protocols.measure import Measurement, check, settings_of
from raphael.evaluate.protocols.prompts import list_sha256, lowest_captions, protocol_prompts
from raphael.evaluate.protocols.protocol import load_protocol, protocol_names

NAMES = [
    "coco2014-30k/community", "coco2014-val-30k/v1", "drawbench/v1", "fid-5k/v1", "pair-debug/v1", "partiprompts/v1",
    "scenes-heldout/v1", "styles/v1", "sweep/v1", "systems/v1", "vilg-300/v1",
]  # fmt: skip
CLIP = Network("fd_clip_x", None, "c" * 64, "clip")
INCEPTION = Network("fid", None, "6726825d" + "0" * 56, "inception")


def test_every_protocol_that_is_promised_is_there_and_reads():
    assert protocol_names() == NAMES
    for name in NAMES:
        protocol = load_protocol(name)
        assert protocol.identity == name and protocol.about


def test_a_key_that_a_protocol_does_not_know_is_an_error_that_names_it(tmp_path):
    from raphael.evaluate.protocols.protocol import FOLDER

    text = (FOLDER / "pair-debug--v1.yaml").read_text()
    (tmp_path / "pair-debug--v1.yaml").write_text(text + "min_image: 3\n")
    with pytest.raises(ConfigError, match="unknown key min_image; did you mean min_images"):
        load_protocol("pair-debug/v1", tmp_path)
    (tmp_path / "pair-debug--v1.yaml").write_text(text.replace("version: v1", "version: v2"))
    with pytest.raises(ConfigError, match="calls itself pair-debug/v2"):
        load_protocol("pair-debug/v1", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "count", "first"),
    [
        ("coco2014-30k/community", "coco/coco_30k.csv", 30000, "A bicycle replica with a clock as the front wheel."),
        ("drawbench/v1", "prompts/drawbench.csv", 200, "A red colored car."),
        ("partiprompts/v1", "prompts/PartiPrompts.tsv", 1632, "bond"),
        ("vilg-300/v1", "prompts/ViLG-300.csv", 300, "A red colored car."),
    ],
)
def test_the_public_lists_are_the_ones_that_the_protocols_are_fixed_to(shared_data, tmp_path, name, file, count, first):
    prompts = protocol_prompts(load_protocol(name), shared_data / file)
    assert len(prompts) == count and prompts[0]["prompt"] == first
    assert all(entry["prompt"] and "\n" not in entry["prompt"] for entry in prompts)
    if name == "coco2014-30k/community":
        assert (prompts[1]["seed"], prompts[1]["reference"]) == (63155, "179765")
    changed = tmp_path / "changed"
    changed.write_bytes((shared_data / file).read_bytes().replace(first.encode(), b"another thing", 1))
    with pytest.raises(StageError, match="is defined on"):
        protocol_prompts(load_protocol(name), changed)


def test_styles_are_every_style_with_every_subject():
    prompts = protocol_prompts(load_protocol("styles/v1"), None)
    assert len(prompts) == 100 and len({entry["prompt"] for entry in prompts}) == 100
    assert {entry["suite"] for entry in prompts} >= {"cyberpunk style", "ink illustration"}


def test_the_caption_is_the_one_of_the_lowest_annotation_id_whatever_the_order_of_the_file():
    rows = [(7, 30, "late"), (7, 4, "first\n one "), (2, 9, "other"), (7, 5, "second")]
    annotations = {"annotations": [{"image_id": i, "id": a, "caption": c} for i, a, c in rows]}
    assert lowest_captions(annotations, "x") == [(2, "other"), (7, "first one")]


def test_five_thousand_are_the_first_of_thirty_thousand(tmp_path):
    rows = [{"image_id": i, "id": 10 * i + k, "caption": f"caption {k} of {i}"} for i in range(31000) for k in (1, 0)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    many = protocol_prompts(load_protocol("coco2014-val-30k/v1"), tmp_path / "captions.json")
    few = protocol_prompts(load_protocol("fid-5k/v1"), tmp_path / "captions.json")
    assert len(many) == 30000 and [e["reference"] for e in many[:5000]] == [e["reference"] for e in few]
    assert many[0]["prompt"] == f"caption 0 of {many[0]['reference']}"
    ids = [int(entry["reference"]) for entry in few]
    assert ids != sorted(ids) and 14000 < sum(ids) / 5000 < 17000  # drawn from all over


def folder_of(tmp_path, prompts, settings=None, **entry):
    files = [f"{index:05d}.png" for index in range(len(prompts))]
    images = [{"file": f, "index": i, "prompt": p, **entry} for i, (f, p) in enumerate(zip(files, prompts))]
    settings = {"seed": 0, "guidance_scale": 4.0, "sampler": "ddim", "steps": 30} if settings is None else settings
    listing = {"model": "abc", "settings": settings, "images": images}
    return ImageFolder(tmp_path, tuple(tmp_path / f for f in files), listing)


def measurement(protocol, drawn):
    prompts = [entry["prompt"] for entry in drawn.listing["images"]]
    return Measurement(protocol, drawn, None, settings_of(drawn.listing, {}), prompts)


def test_images_of_the_right_prompts_in_order_with_known_settings_are_accepted(tmp_path):
    protocol = load_protocol("styles/v1")
    prompts = [entry["prompt"] for entry in protocol_prompts(protocol, None)]
    drawn = folder_of(tmp_path, prompts)
    check(measurement(protocol, drawn), [CLIP])
    assert list_sha256(drawn.listing["images"]) == protocol.captions.list_sha256
    for wrong, says in (
        (folder_of(tmp_path, prompts[::-1]), "not its prompts in its order"),
        (folder_of(tmp_path, prompts[:99]), "got 99 images, expected at least 100"),
        (folder_of(tmp_path, [*prompts, "one more"]), "expected exactly 100"),
        (folder_of(tmp_path, prompts, {"seed": 0, "steps": 30}), "guidance_scale, sampler unknown"),
        (folder_of(tmp_path, prompts, {"seed": 3, "steps": 1, "sampler": "x", "guidance_scale": 1}), "got the seed 3"),
    ):
        with pytest.raises(StageError, match=says):
            check(measurement(protocol, wrong), [CLIP])
    with pytest.raises(StageError, match="needs a network of kind clip"):
        check(measurement(protocol, drawn), [INCEPTION])


def test_a_distance_below_its_minimum_or_without_the_published_inception_is_no_number(tmp_path):
    protocol = load_protocol("fid-5k/v1")
    with pytest.raises(StageError, match="got 4,999 images, expected at least 5,000"):
        protocol.check_counts(4999, 40504)
    with pytest.raises(StageError, match="got 40,503 references"):
        protocol.check_counts(5000, 40503)
    drawn = folder_of(tmp_path, ["x"] * 5000)
    reference = ImageFolder(tmp_path, tuple([tmp_path / "r.jpg"] * 40504), {})
    item = Measurement(protocol, drawn, reference, settings_of(drawn.listing, {}), None)
    check(item, [CLIP, INCEPTION])
    with pytest.raises(StageError, match="no FID"):
        check(item, [CLIP, Network("fd_inception_0badc0de", None, "0badc0de", "inception")])


def test_a_name_stands_for_one_network_and_says_so_otherwise():
    assert INCEPTION.name_of("kid") == "kid" and INCEPTION.metric(5000) == "fid_5000"
    assert CLIP.name_of("kid") == "kid_clip_x" and CLIP.name_of("cmmd") == "cmmd_clip_x"
    assert Network("fd_clip_x", None, "c", "clip", defines_cmmd=True).name_of("cmmd") == "cmmd"
