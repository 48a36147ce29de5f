"""What the paper varies of RAPHAEL (figure 6, table 3): alpha, the numbers of experts, T_c."""

from __future__ import annotations

from typing import Any

from raphael.base.config.studied import Knob, Studied

NO_ALPHA = "the model has no Space-MoE, so nothing reads alpha"


def read(unet: dict[str, Any], training: dict[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """A network without a mixture counts as one with 0 of its experts; one with a plain layer there is another kind."""
    unet, training = dict(unet), dict(training)
    numbers = {"edge_max_timestep": float(training.pop("edge_max_timestep"))}
    numbers["mask_threshold"] = float(unet.pop("mask_threshold"))
    for kind in ("space", "time"):
        layer, count = unet.pop(f"{kind}_layer"), unet.pop(f"num_{kind}_experts")
        numbers[f"{kind}_experts"] = 0.0 if layer == "none" else float(count)
        unet[f"{kind}_layer"] = "dense" if layer == "dense" else "moe or none"
    return numbers, {"unet": unet, "training": training}


STUDIED = Studied(
    knobs={
        "mask_threshold": Knob(
            "alpha", "The threshold alpha of attention maps", "alpha", 0.0, 1.0,
            lambda unet: "" if unet["space_layer"] == "moe" else NO_ALPHA,
        ),
    },
    numbers={
        "space_experts": ("Space experts", "space experts"),
        "time_experts": ("Time experts", "time experts"),
        "edge_max_timestep": ("T_c of the edge loss", "T_c"),
        "mask_threshold": ("alpha, trained anew", "alpha"),
    },
    read=read,
    timed=("space_experts", "time_experts"),
    # fills the context, so that every space expert can be needed: the paper's measure of cost
    prompt=" ".join(["a red circle left of a blue star and a green square on yellow"] * 8),
)  # fmt: skip
