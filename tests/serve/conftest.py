"""Servers of the tests: the real one on a free port, in a thread, over a tiny model or over work a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from raphael.base.config.sampling import Sampling
from raphael.serve.app import Settings, create_app
from raphael.serve.info import Catalogue, ModelInfo
from raphael.serve.server import Address, OneSignal, uvicorn_config

INFO = ModelInfo("tiny", "raphael", "0" * 16, (32, 32), 8, 128, Sampling(steps=3), ("switch", "image", "inpaint"), True)


@dataclass
class Served:
    """A server that runs, and how it is asked: `client` by the names and headers of its own page."""

    url: str
    app: Any
    client: httpx.Client
    stop: Callable[[], None]  # as SIGTERM does
    folder: Any = None  # the pipeline's, and the models in memory, where there are any
    models: Any = None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextlib.contextmanager
def running(catalogue: Catalogue, perform: Callable, **settings: Any) -> Iterator[Served]:
    listener = Address(port=0).bind()
    port = listener.getsockname()[1]
    app = create_app(catalogue, perform, Settings(Address().hosts(port), **settings))
    server = OneSignal(uvicorn_config(app), line="")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield Served(f"http://127.0.0.1:{port}", app, client, lambda: server.handle_exit(signal.SIGTERM, None))
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(5)
        assert not thread.is_alive(), "the server did not end"


def until(holds: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.01)


@dataclass
class Gate:
    """Work that waits for the test: three steps, each when `step` is released."""

    step: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    begun: list[Any] = field(default_factory=list)
    fault: Exception | None = None

    def __call__(self, task: Any, watch: Any) -> dict[str, Any]:
        self.begun.append(task)
        for done in range(1, 4):
            while not self.step.acquire(timeout=0.02):
                watch.evaluation()
            watch.step(done, 1.0 / done, lambda: ["data:image/png;base64,AAAA"])
        if self.fault:
            raise self.fault
        return {"model": task.model, "images": [{"index": 0, "seed": task.body.seed, "b64_png": "AAAA"}], "seconds": {}}


@pytest.fixture(name="running")
def _running() -> Callable[..., Any]:
    return running


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate) -> Iterator[Callable[..., Any]]:
    """gated(limits=...) -> a server whose work waits at `gate`."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(Catalogue((INFO,)), gate, **settings))
        for _ in range(100):
            gate.step.release()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The whole server over a pipeline folder with random weights, 32 x 32 px."""
    import torch
    from truth.tiny_raphael import write_pipeline

    from raphael.serve.models import open_models
    from raphael.serve.server import local_perform

    torch.set_num_threads(1)
    folder = write_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    models = open_models([str(folder)], "cpu")
    models["tiny"].pipeline.defaults = few = replace(models["tiny"].pipeline.defaults, steps=4)
    models["tiny"].info = replace(models["tiny"].info, defaults=few)
    with running(Catalogue((models["tiny"].info,)), local_perform(models)) as served:
        served.folder, served.models = folder, models
        yield served


@pytest.fixture(scope="module")
def tiny_ddpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same over a DDPM of two classes in pixels, 16 x 16 px."""
    import torch

    from raphael.base.checkpoint.folder import write_checkpoint
    from raphael.base.config.preset import DiffusionConfig
    from raphael.base.config.unet import PlainUNetConfig
    from raphael.base.strict import to_dict
    from raphael.net.plain import PlainBlock
    from raphael.net.unet import UNet
    from raphael.serve.models import open_models
    from raphael.serve.server import local_perform

    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"latent_channels": 3, "channels": (8, 16), "res_blocks": 1, "attention_levels": (1,), "vector_dim": 2}
    config = PlainUNetConfig(**shape, head_dim=8, norm_groups=4)
    diffusion = DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", True)
    meta = {"system": "ddpm", "unet": to_dict(config), "diffusion": to_dict(diffusion), "classes": ["circle", "star"]}
    folder = tmp_path_factory.mktemp("model") / "shapes"
    weights = UNet(config, PlainBlock).state_dict()
    picture = {"picture": {"sizes_px": [[16, 16]]}, "images_seen": 0}
    write_checkpoint(folder, {"ema": weights, "raw": weights}, meta | picture)
    models = open_models([str(folder)], "cpu")
    with running(Catalogue((models["shapes"].info,)), local_perform(models)) as served:
        yield served
