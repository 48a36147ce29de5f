"""Which modules of raphael/evaluate are RAPHAEL's own, and that the others name none of its fields."""

import dataclasses
import re

from test_boundaries import PROJECT
from test_raphael_only import OWN as EVERYWHERE

from raphael.base.config.preset import RaphaelUNetConfig

ROOM = "raphael/evaluate/"
OWN = {name.removeprefix(ROOM) for name in EVERYWHERE if name.startswith(ROOM)}
WORDS = {
    "space_moe", "time_moe", "space_routes", "time_routes", "space_gate", "time_gate", "token_routes", "time_table",
    "routes_chart", "mask_cover", "gate_entropy", "edge_map", "edge_detector", "edge_max_timestep", "RaphaelBlock",
    "SpaceMoE", "TimeMoE",
}  # fmt: skip


def fields() -> set[str]:
    """Those of the U-Net's settings that speak of mixtures, gates, edges, masks, or the pooled text."""
    names = {field.name for field in dataclasses.fields(RaphaelUNetConfig)}
    return {name for name in names if re.search(r"space|time_|expert|gate|edge|mask|moe|mean_over|pooled", name)}


def named(text: str) -> set[str]:
    return {word for word in fields() | WORDS if re.search(rf"(?<![a-z_]){word}(?![a-z_])", text)}


def test_the_rest_of_evaluate_names_no_field_of_raphaels():
    room = PROJECT / ROOM
    found = {}
    for file in sorted(room.rglob("*.py")):
        name = file.relative_to(room).as_posix()
        if name not in OWN and (words := named(file.read_text(encoding="utf-8"))):
            found[name] = sorted(words)
    assert not found, f"RAPHAEL's fields in {found}; put it into one of {sorted(OWN)}, or list the module there"


def test_the_list_of_its_own_modules_is_no_longer_than_it_has_to_be():
    room = PROJECT / ROOM
    spoken = r"route|expert|knock|pooled|edge"
    idle = [name for name in OWN if not re.search(spoken, (room / name).read_text(encoding="utf-8"))]
    assert not idle, f"{idle} could be of any system"


def test_the_fields_are_found_where_they_are():
    assert {"space_layer", "num_space_experts", "mask_threshold", "mean_over", "pooled_text"} <= fields()
    assert named('unet["mask_threshold"] and space_moe_removed') == {"mask_threshold"}
    assert named("self.space_moe") == {"space_moe"}
