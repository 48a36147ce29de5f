"""The rehearsed web does to each address what its table says, the guard stays on, and nothing leaves the machine."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_pipeline.download import stage as download
from data_pipeline.download.serve_rehearsal import FATES, GONE, Photographs, fate_of, serve
from data_pipeline.gateway import proxy as gateway
from data_pipeline.gateway.addresses import Resolver, parse
from data_pipeline.gateway.proxy import Fetched, Policy, fetch
from raphael.base.config.params import load_config
from raphael.base.stage import StageError


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 255, (300, 400, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=50)
    return folder


@pytest.fixture(scope="module")
def policy(photographs):
    with serve(photographs) as web:
        yield Policy(timeout_s=1.0, deadline_s=2.0, retries=0, resolver=Resolver(web.resolve), rehearsal_port=web.port)


def addresses_of(wanted: str, count: int = 1) -> list[str]:
    """The first so many addresses with this fate."""
    found = []
    for number in range(100_000):
        host, path = f"host{number % 40}.example", f"/{number}.jpg"
        if fate_of(host, path) == wanted:
            found.append(f"https://{host}{path}")
            if len(found) == count:
                return found
    raise AssertionError(f"no address of 100,000 meets {wanted}")


def test_the_shares_are_those_of_the_table():
    assert sum(fate.share for fate in FATES.values()) == pytest.approx(1)
    hosts, paths = 2000, 20
    met = Counter(fate_of(f"h{number // paths}.example", f"/{number}") for number in range(hosts * paths))
    for name, fate in FATES.items():  # four standard deviations; names share their fate, so there are fewer of them
        trials = hosts if name == GONE else hosts * paths
        assert abs(met[name] / (hosts * paths) - fate.share) < 4 * (fate.share / trials) ** 0.5 + 1e-3, name


@pytest.mark.parametrize("name", FATES)
def test_an_address_meets_the_fate_of_the_table_and_the_gateway_says_so(policy, name):
    (url,) = addresses_of(name)
    outcome = fetch(url, policy)
    said = "success" if isinstance(outcome, Fetched) else outcome.reason
    assert said == FATES[name].outcome


def test_a_path_with_two_slashes_is_not_another_address(policy):
    urls = [url.replace(".example/", ".example//") for url in addresses_of("picture", 30)]
    for url in urls:
        outcome = fetch(url, policy)
        said = "success" if isinstance(outcome, Fetched) else outcome.reason
        target = parse(url)
        assert target.path.startswith("//") and said == FATES[fate_of(target.host, target.path)].outcome


def test_each_address_has_an_image_of_its_own_the_same_every_time(policy):
    urls = addresses_of("picture", 60)
    bodies = [fetch(url, policy).body for url in urls]
    assert len(set(bodies)) == len(bodies) and bodies[:5] == [fetch(url, policy).body for url in urls[:5]]
    kinds = Counter(Image.open(io.BytesIO(body)).format for body in bodies)
    assert kinds["JPEG"] > 40 and len(kinds) > 1
    copies = {fetch(url, policy).body for url in addresses_of("copy", 12)}
    assert len(copies) <= 3, "whole photographs come again under other addresses"


def test_private_addresses_are_refused_as_ever_and_every_connection_stays_here(policy, monkeypatch):
    for url in ("http://127.0.0.1/a.jpg", "http://192.168.0.1/a.jpg", "http://[::1]/a.jpg"):
        assert fetch(url, policy).reason == "private address"
    connected = []
    connect = gateway._Attempt._connect
    monkeypatch.setattr(
        gateway._Attempt, "_connect", lambda self, *place: connected.append(place) or connect(self, *place)
    )
    for name in ("picture", "moved", "inward", "loop", "404"):
        fetch(addresses_of(name)[0], policy)
    assert len(connected) == 1 + 2 + 1 + (policy.max_redirects + 1) + 1
    assert set(connected) == {("127.0.0.1", policy.rehearsal_port)}


def test_a_folder_without_images_or_a_source_that_lies_here_is_one_clear_line(project, tmp_path):
    with pytest.raises(StageError, match="no images .* name a folder with some"):
        Photographs(tmp_path)
    config = load_config(project / "params.yaml")
    config = dataclasses.replace(config, download=dataclasses.replace(config.download, rehearsal=str(tmp_path)))
    with pytest.raises(StageError, match="source.kind scenes, whose images lie here already"):
        download._refuse_rehearsal(config)
