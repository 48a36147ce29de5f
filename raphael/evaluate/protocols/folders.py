"""`raphael evaluate --images A --reference B --protocol P`, `raphael prompts`: options in, a report and a table out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raphael.base import devices
from raphael.base.stage import StageError, read_json, write_json
from raphael.evaluate.catalogue import metric_named
from raphael.evaluate.features.extract import INCEPTION_FILE, INCEPTION_FROM
from raphael.evaluate.features.image_folder import ImageFolder
from raphael.evaluate.features.spaces import RANDOM
from raphael.evaluate.protocols.protocol import Protocol, load_protocol
from raphael.evaluate.subject import CLIP, FEATURES

if TYPE_CHECKING:
    from raphael.evaluate.features.spaces import Network
    from raphael.evaluate.protocols.measure import Measurement

INCEPTION_HOME = Path("models/inception") / INCEPTION_FILE
CLIP_HOME = Path("models/clip")


def evaluate_folders(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, write the report to --out, print the table. Raises StageError and ValueError, one line."""
    own = load_protocol(arguments.protocol)
    protocol = own.with_metrics(arguments.metric or (), "--metric")
    if arguments.workers < 1:
        raise StageError(f"--workers: got {arguments.workers}, expected at least 1")
    if protocol.needs_reference and not arguments.reference:
        raise StageError(f"{protocol.identity}: got no --reference, expected a folder: {protocol.reference}")
    if arguments.reference and not protocol.needs_reference:
        raise StageError(f"{protocol.identity}: got --reference, but this protocol has none")
    generated = ImageFolder.read(arguments.images, protocol.pictures.drawn)
    reference = ImageFolder.read(arguments.reference, protocol.pictures.reference) if arguments.reference else None
    protocol.check_counts(len(generated.files), len(reference.files) if reference else 0)
    specs = feature_specs(protocol, arguments.features or [])

    from tqdm import tqdm

    from raphael.evaluate.features.spaces import open_network
    from raphael.evaluate.protocols.measure import Measurement, check, measure, settings_of, table
    from raphael.evaluate.protocols.tracked import log_report

    given = {name: getattr(arguments, name) for name in ("guidance_scale", "sampler", "steps", "weights")}
    measurement = Measurement(
        protocol, generated, reference, settings_of(generated.listing, given), _prompts(generated, arguments.prompts)
    )
    measurement.beside = protocol.metrics[len(own.metrics) :]
    measurement.aesthetic_head = arguments.aesthetic_head
    device = devices.resolve(arguments.device or "auto", "--device")
    networks = [open_network(spec, device=device) for spec in specs]
    if networks:
        print(f"raphael evaluate: device {devices.describe(device)}", file=sys.stderr, flush=True)
    check(measurement, networks)
    total = len(generated.files) + (len(reference.files) if reference else 0)
    with tqdm(total=total, unit=" images", desc="features", dynamic_ncols=True) as bar:
        tick = bar.update
        if networks and (arguments.workers > 1 or arguments.ray):
            _embed_by_workers(measurement, networks, (specs, arguments, str(device)), bar.update)
            tick = lambda n: None  # noqa: E731 - they are counted already
        report = measure(measurement, networks, Path(arguments.cache), tick)
    if arguments.out:
        write_json(arguments.out, report)
    print(table(report))
    print(log_report(report, generated.listing, Path(arguments.params)))
    return report


def _embed_by_workers(
    measurement: Measurement, networks: list[Network], asked: tuple[list[str], argparse.Namespace, str], tick: Any
) -> None:
    """Fill the cache with the features that `measure` will read. asked: the networks' specs, the options, the
    device."""
    from raphael.evaluate.features.cache import cached_sets
    from raphael.evaluate.features.workers import Work, embed_by_processes, embed_on_ray

    specs, arguments, device = asked
    rules, cache = measurement.protocol.pictures, Path(arguments.cache)
    folders = tuple(side for side in (measurement.generated, measurement.reference) if side is not None)
    sets = [cached_sets(side, rules.preparation, networks, cache) for side in folders]
    seen = 0

    def look() -> None:
        nonlocal seen
        finished = sum(min(one.finished() for one in of_side) for of_side in sets)
        if finished > seen:
            tick(finished - seen)
        seen = finished

    work = Work(tuple(specs), folders, (rules.preparation, rules.only_size_px), cache, device)
    (embed_on_ray if arguments.ray else embed_by_processes)(work, arguments.workers, look=look)
    look()


def feature_specs(protocol: Protocol, given: list[str]) -> list[str]:
    """The networks to use: those given, and for what the protocol needs beyond them its usual place.

    Raises StageError that says which file is missing, where it comes from and where it goes.
    """
    specs = list(given)
    if "inception" in protocol.networks and not any(spec.startswith("inception:") for spec in specs):
        if not INCEPTION_HOME.is_file():
            raise StageError(
                f"{protocol.identity} needs {INCEPTION_FILE}: where there is a network, fetch {INCEPTION_FROM}, put it "
                f"at {INCEPTION_HOME}, or give --features inception:FILE"
            )
        specs.append(f"inception:{INCEPTION_HOME}")
    if RANDOM in protocol.networks and RANDOM not in specs:
        specs.append(RANDOM)
    reads_features = any({FEATURES, CLIP} & set(metric_named(name).needs) for name in protocol.metrics)
    wants_clip = "clip" in protocol.networks or not protocol.networks and reads_features
    if wants_clip and not any(not spec.startswith(("inception:", "taesd:", RANDOM)) for spec in specs):
        if (CLIP_HOME / "config.json").is_file() or (CLIP_HOME / "pointer.json").is_file():
            specs.append(str(CLIP_HOME))
        elif not specs or "clip" in protocol.networks:
            raise StageError(
                f"{protocol.identity} needs a CLIP: give --features open_clip:ViT-B-32:FILE (where there is a network, "
                f"hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K), clip:FOLDER, or put one at {CLIP_HOME}"
            )
    return specs


def write_prompts(arguments: argparse.Namespace) -> None:
    """The prompts of a protocol in the form of data/source/prompts.json."""
    from raphael.evaluate.protocols.prompts import list_sha256, protocol_prompts

    if arguments.bench:
        from raphael.evaluate.protocols.benches import bench_rows

        rows = bench_rows(arguments.bench, arguments.source)
        prompts = [{"prompt": row.prompt, "suite": arguments.bench, "truth": None, "reference": row.id} for row in rows]
        write_json(arguments.out, {"bench": arguments.bench, "sha256": list_sha256(prompts), "prompts": prompts})
        print(f"{arguments.out}: {len(prompts):,} prompts of {arguments.bench}")
        return
    protocol = load_protocol(arguments.protocol)
    prompts = protocol_prompts(protocol, arguments.source)
    digest = list_sha256(prompts)
    write_json(arguments.out, {"protocol": protocol.identity, "sha256": digest, "prompts": prompts})
    print(f"{arguments.out}: {len(prompts):,} prompts of {protocol.identity}, sha256 {digest[:16]}")


def _prompts(generated: ImageFolder, file: Path | None) -> list[str] | None:
    """One prompt per image: of --prompts (lines, or JSON as `raphael prompts` writes it), else of images.json."""
    if file is None:
        entries = generated.listing.get("images", [])
        return [entry["prompt"] for entry in entries] if entries and all("prompt" in e for e in entries) else None
    if not Path(file).is_file():
        raise StageError(f"--prompts: {file}: no such file; expected one prompt a line, or JSON of `raphael prompts`")
    if Path(file).suffix == ".json":
        try:
            prompts = [entry["prompt"] for entry in read_json(file)["prompts"]]
        except (KeyError, TypeError):
            raise StageError(f"--prompts: {file}: expected prompts: [{{prompt}}, ...]") from None
    else:
        prompts = Path(file).read_text(encoding="utf-8").splitlines()
    if len(prompts) != len(generated.files):
        got = f"got {len(prompts)} prompts for {len(generated.files)} images"
        raise StageError(f"--prompts: {file}: {got}, expected as many")
    return prompts
