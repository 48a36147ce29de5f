"""Do all workers run the same software? Asked once, before the first step.

A node with another torch would train along, but not to the same bits; one with other sources of ours might compute
something else. Neither shows in a loss, so it is an error.
"""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from pathlib import Path

import torch

from raphael.base.stage import StageError
from raphael.train.distributed.world import World

ROOM = 1024  # bytes of a worker's message


def own_versions() -> dict[str, str]:
    """What must agree, of this process. sources: the head of a sha256 over raphael's own modules (7 ms)."""
    import numpy
    import safetensors

    package = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "raphael's sources": digest.hexdigest()[:12],
    }


def check_versions(world: World) -> None:
    """Every worker calls it; one message. Raises StageError on all of them where they differ."""
    if world.size == 1:
        return
    text = json.dumps({"host": socket.gethostname()[:64], **own_versions()}).encode()
    own = torch.zeros(ROOM, dtype=torch.uint8)
    own[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    own = own.to(world.device)
    everyone = [torch.empty_like(own) for _ in range(world.size)]
    torch.distributed.all_gather(everyone, own)
    if line := difference([json.loads(bytes(one.tolist()).rstrip(b"\0")) for one in everyone]):
        raise StageError(line)


def difference(workers: list[dict[str, str]]) -> str:
    """One line that names what differs, with its versions and who has them; "" where all agree. workers: by rank."""
    found = []
    for name in sorted({name for worker in workers for name in worker} - {"host"}):
        having: dict[str, list[int]] = {}
        for rank, worker in enumerate(workers):
            having.setdefault(worker.get(name, "none"), []).append(rank)
        if len(having) > 1:
            versions = (f"{version} on {_who(ranks, workers)}" for version, ranks in having.items())
            found.append(f"{name} {', '.join(versions)}")
    if not found:
        return ""
    return (
        f"the workers run different software: got {'; '.join(found)}, expected one version of each; install the same "
        "requirements.lock and the same sources on every node. Nothing was trained: the same command then resumes from "
        "the newest checkpoint"
    )


def _who(ranks: list[int], workers: list[dict[str, str]]) -> str:
    hosts = list(dict.fromkeys(workers[rank]["host"] for rank in ranks))
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"worker{'s' if len(ranks) > 1 else ''} {shown} ({', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''})"
