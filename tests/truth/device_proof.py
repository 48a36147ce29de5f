"""Every case of device_cases.py on the CPU and on the pretended GPU.

    python -m truth.device_proof OUT.json FOLDER [CASE ...]

OUT.json: {case: {"error": traceback or "", "printed", "here", "there", "differences": {name: [norm of the difference,
norm of the CPU's]}}}, and "refusals".
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from truth import pretend_gpu
from truth.device_cases import CASES, Found


def refusals() -> dict[str, Any]:
    """What the pretended GPU says to code that forgot something: the proof can fail."""
    import torch

    with pretend_gpu.PretendGpu() as gpu:
        net, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
        net(x)
        moved = torch.nn.Linear(3, 2).to(pretend_gpu.NAME)
        tries = {
            "a batch that stayed": lambda: moved(x),
            "a module that stayed": lambda: net(x.to(pretend_gpu.NAME)),
            "a table that stayed": lambda: x.to(pretend_gpu.NAME) + torch.ones(3),
            "indices on the device, of a table that stayed": lambda: x[torch.tensor([0]).to(pretend_gpu.NAME)],
            "numpy of the device": lambda: moved(x.to(pretend_gpu.NAME)).detach().numpy(),
            "what is right": lambda: moved(x.to(pretend_gpu.NAME))[torch.tensor([0])].sum().add(1).backward(),
        }
        said = {}
        for name, attempt in tries.items():
            said[name] = "nothing"
            with contextlib.suppress(RuntimeError, TypeError):
                attempt()
                continue
            said[name] = "refused"
    return {"said": said, "here": list(gpu.here)}


def main(out: Path, folder: Path, names: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    pretend_gpu.install()
    results: dict[str, Any] = {"refusals": refusals()}
    results |= {name: both(function, folder / name) for name, function in CASES.items() if name in (names or CASES)}
    out.write_text(json.dumps(results, indent=1))


def both(function: Callable[[Path, str], Found], folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {"error": ""}
    started_s = time.process_time()
    printed = io.StringIO()
    gpu = pretend_gpu.PretendGpu()
    try:
        for device in ("cpu", "cuda"):
            (folder / device).mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = function(folder / "cpu", "cpu")
        gpu = pretend_gpu.PretendGpu()
        with contextlib.redirect_stdout(printed), gpu:
            found = function(folder / "cuda", "cuda")
        result["differences"] = {name: apart(found[name], truth[name]) for name in truth}
    except Exception:
        result["error"] = traceback.format_exc()
    return (
        result
        | {"printed": printed.getvalue(), "here": dict(gpu.here), "there": dict(gpu.there)}
        | {"seconds": time.process_time() - started_s}
    )


def apart(found: Any, truth: Any) -> list[float]:
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    assert found.shape == truth.shape, (found.shape, truth.shape)
    return [float(np.linalg.norm(found - truth)), float(np.linalg.norm(truth))]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
