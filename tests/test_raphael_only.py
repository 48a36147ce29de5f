"""Which modules are RAPHAEL's own, and that no other one names what only RAPHAEL has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from test_boundaries import PROJECT, imports, modules, under

from raphael.base.config.params import load_config
from raphael.base.config.preset import RaphaelUNetConfig
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.strict import flatten, to_dict
from raphael.objectives.denoising_settings import DenoisingSettings

# Mixtures, gates, edges, routes
OWN = (
    "raphael/net/moe/",
    "raphael/net/lora/sites.py",  # experts are among what an adapter may add to
    "raphael/objectives/denoising.py",
    "raphael/objectives/denoising_settings.py",
    "raphael/summary/inside.py",  # routes, masks and edges by step
    "raphael/edit/pictures.py",
    "raphael/evaluate/instruments/knockouts.py",  # a mixture, its gate or its masks taken away
    "raphael/evaluate/instruments/swap.py",  # the pooled text
    "raphael/evaluate/report/inside.py",
    "raphael/evaluate/report/inside_sheet.py",
    "raphael/evaluate/report/route_figures.py",
    "raphael/evaluate/report/routes.py",
    "raphael/evaluate/studies/path_classifier.py",
    "raphael/evaluate/studies/path_figures.py",
    "raphael/evaluate/studies/path_report.py",
    "raphael/evaluate/studies/paths.py",
    "raphael/serve/inside.py",  # the page's routes, masks and edges
    "raphael/systems/lora/names.py",  # what others call the matrices of RAPHAEL's block
)
# Systems and presets may name what they set
FREE = ("raphael/systems/raphael/", "raphael/base/config/preset.py")
SETTINGS = {field.name for field in fields(RaphaelUNetConfig)} - {field.name for field in fields(PlainUNetConfig)}
LOSS = {
    "edge_weight", "edge_max_timestep", "edge_resolution", "edge_block_weights", "focal_alpha", "focal_gamma",
    "balance", "balance_weight", "balance_rate",
}  # fmt: skip
PARTS = {
    "space_moe", "time_moe", "space_dense", "time_dense", "edge_head", "edge_logits", "space_routes", "time_routes",
    "time_balance_loss",
}  # fmt: skip
NAMES = SETTINGS | LOSS | PARTS


def named(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Attributes, keywords, fields of classes and texts that are a name of RAPHAEL's."""
    for node in ast.walk(tree):
        found = {
            ast.Attribute: lambda n: n.attr,
            ast.keyword: lambda n: n.arg,
            ast.AnnAssign: lambda n: getattr(n.target, "id", None),
            ast.Constant: lambda n: n.value if isinstance(n.value, str) else None,
        }.get(type(node), lambda n: None)(node)
        if found in NAMES:
            yield getattr(node, "lineno", 0), found


def faults(file: Path) -> list[str]:
    path, tree = file.relative_to(PROJECT).as_posix(), ast.parse(file.read_text(encoding="utf-8"))
    found = [f"{path}:{line}: {name}" for line, name in named(tree)]
    if path.startswith(("raphael/net/", "raphael/objectives/")):
        own = ("raphael.net.moe", "raphael.base.config.preset.RaphaelUNetConfig")
        found += [
            f"{path}:{line}: imports {name}"
            for line, name in imports(tree, file)
            if any(under(name, package) for package in own)
        ]
    return found


def elsewhere() -> dict[str, list[str]]:
    """path -> faults, of all modules that are neither RAPHAEL's nor free to name it."""
    files = {file.relative_to(PROJECT).as_posix(): file for file in modules("raphael", "data_pipeline", "flows")}
    told = {path: faults(file) for path, file in files.items() if not path.startswith(OWN + FREE)}
    return {path: lines for path, lines in told.items() if lines}


def test_the_names_are_of_fields_that_exist():
    assert {field.name for field in fields(DenoisingSettings)} >= LOSS and len(SETTINGS) > 15
    for path in (*OWN, *FREE):
        assert (PROJECT / path).exists(), f"{path}: no such module; take it off the list"


@pytest.mark.parametrize("room", ["net", "objectives"])
def test_nothing_of_raphael_is_named_outside_its_own_modules_of(room):
    found = [line for path, lines in elsewhere().items() if path.startswith(f"raphael/{room}/") for line in lines]
    assert not found, "\n".join(found)


def test_nobody_else_names_anything_of_raphael():
    """What a layer needs to know of it, the system says as data (raphael/base/config/systems.py)."""
    found = elsewhere()
    assert not found, "RAPHAEL's alone: " + "\n".join(line for lines in found.values() for line in lines)


def test_the_settings_that_all_systems_share_hold_none_of_raphaels():
    keys = flatten(to_dict(load_config(PROJECT / "params.yaml")))
    own = {field.name for field in fields(DenoisingSettings)}
    assert {f"train.settings.{name}" for name in own} <= keys.keys()
    shared = {part for key in keys if not key.startswith("train.settings.") for part in key.split(".")}
    assert not shared & (own | NAMES)


@pytest.mark.parametrize(
    "line", ["config.edge_tokens", "f(num_space_experts=2)", "x = 'mean_over'", "class A:\n  gate_noise: int"]
)
def test_a_name_of_raphael_is_seen_however_it_is_written(line):
    assert list(named(ast.parse(line)))
