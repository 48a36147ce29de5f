"""Every path that computes with torch, as a function of a folder and a device (tests/truth/device_proof.py runs them).

A case returns {name: number or array}: what must be the same on every device, up to rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from truth.image_workspace import SMALL, small_preset
from truth.image_workspace import write_workspace as write_pictures
from truth.tiny_raphael import ROOT, write_pipeline

CASES: dict[str, Callable[[Path, str], dict[str, Any]]] = {}
Found = dict[str, Any]


def case(function: Callable[[Path, str], Found]) -> Callable[[Path, str], Found]:
    CASES[function.__name__] = function
    return function


def run_stage(name: str, module: Any, root: Path, device: str) -> None:
    from raphael.base.stage import main

    asked = ["--params", str(root / "params.yaml"), "--device", device]
    assert main(name, module.run, "", asked, device=module.device_of) == 0


def report(root: Path, name: str, *keys: str) -> Found:
    found = json.loads((root / f"reports/{name}.json").read_text())
    return {key: found[key] for key in keys}


def weights(file: Path) -> Found:
    from safetensors.numpy import load_file

    return {f"weights {name}": value for name, value in load_file(file).items()}


def image_workspace(root: Path) -> Path:
    loop = {"ema_decay": 0.9, "ema_every_steps": 1, "precision": "fp32"}
    changes = json.loads(json.dumps(SMALL))
    for part in ("autoencoder", "clip"):
        changes[part]["loop"] |= loop
    changes["model"] = {"preset": small_preset(root, ROOT)}
    return write_pictures(root, ROOT, **changes)


@case
def autoencoder(root: Path, device: str) -> Found:
    from data_pipeline.autoencoder import stage

    run_stage("autoencoder", stage, image_workspace(root), device)
    file = root / "models/autoencoder/diffusion_pytorch_model.safetensors"
    return report(root, "autoencoder", "psnr_db", "latent_std", "scaling_factor") | weights(file)


@case
def adversarial_and_perceptual(root: Path, device: str) -> Found:
    """The autoencoder's further losses, whose networks are moved with the objective."""
    import torch

    from raphael.base.config.params import load_config
    from raphael.base.devices import resolve
    from raphael.base.randomness import SampleRng
    from raphael.encoders.autoencoder import build_autoencoder
    from raphael.objectives.adversarial import AdversarialLoss
    from raphael.objectives.autoencoding import AutoencodingObjective
    from raphael.objectives.perceptual import Lpips

    torch.manual_seed(0)
    config = load_config(image_workspace(root) / "params.yaml").autoencoder
    objective = AutoencodingObjective(
        build_autoencoder(config), 1e-4, 0.5, 16, perceptual=Lpips(), adversarial=AdversarialLoss(0.5, 0, 8, 1)
    )
    objective.to(resolve(device))
    images = torch.randint(0, 256, (2, 16, 32, 3), dtype=torch.uint8)
    outputs = objective({"image": images.to(resolve(device))}, SampleRng(0, 0, [0, 1]))
    outputs["loss"].backward()
    return {name: float(value.detach()) for name, value in outputs.items()}


@case
def clip(root: Path, device: str) -> Found:
    from data_pipeline.clip import stage

    run_stage("clip", stage, image_workspace(root), device)
    return weights(root / "models/clip/model.safetensors")


@case
def clip_pretrained(root: Path, device: str) -> Found:
    from data_pipeline.clip import stage

    write_pipeline(root / "models/raphael")
    image_workspace(root)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["clip"]["pretrained"] = str(root / "models/raphael/text_encoder")
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    run_stage("clip", stage, root, device)
    return weights(root / "models/clip/model.safetensors")


@case
def encode(root: Path, device: str) -> Found:
    import shutil

    from data_pipeline.encode import stage
    from raphael.base.records import MOMENTS, Records

    write_pipeline(root / "models/raphael")
    for theirs, ours in (("autoencoder", "autoencoder"), ("text_encoder", "clip")):
        shutil.copytree(root / "models/raphael" / theirs, root / "models" / ours)
    run_stage("encode", stage, image_workspace(root), device)
    records = Records(root / "data/records")
    return {"moments": records.batch(np.arange(len(records)))[MOMENTS]}


@case
def edges(root: Path, device: str) -> Found:
    """PiDiNet, the one edge detector that is a network."""
    import torch

    from raphael.base.devices import resolve
    from raphael.encoders.edges.pidinet import PiDiNet, edge_probability

    torch.manual_seed(0)
    network = PiDiNet(4, 4).eval().requires_grad_(False).to(resolve(device))
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3)).astype(np.uint8)
    return {"edges": edge_probability(network, images)}


@case
def score(root: Path, device: str) -> Found:
    import torch
    from PIL import Image

    from data_pipeline.score.scorer import Scorer
    from data_pipeline.score.stage import device_of
    from data_pipeline.score.watermark_net import WatermarkModel, WatermarkNet
    from raphael.base.config.params import load_config

    write_pipeline(root / "models/raphael")
    torch.save({"weight": torch.linspace(-1, 1, 16)[None], "bias": torch.zeros(1)}, root / "head.pth")
    torch.manual_seed(0)
    WatermarkModel(WatermarkNet((4, 4, 8))).save(root / "marks.safetensors")
    config = load_config(ROOT / "params.yaml")
    models = {"unsafe": str(root / "head.pth"), "watermark": str(root / "marks.safetensors"), "similarity": True}
    settings = replace(config.score, **models, clip=str(root / "models/raphael/text_encoder"), batch_size=3)
    assert device_of(replace(config, device=device)) is None, "nothing is computed by the settings of the demo"
    scorer = Scorer(settings, str(device_of(replace(config, device=device, score=settings))))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3)).astype(np.uint8)
    return scorer([Image.fromarray(image) for image in pixels], ["a red circle", "two stars", "nothing"])


@case
def train(root: Path, device: str) -> Found:
    from truth.training_workspace import write_workspace

    from raphael.base.checkpoint.home import CheckpointHome
    from raphael.base.stage import Stage
    from raphael.systems import train_stage
    from raphael.systems.raphael.training import Folders, TrainingJob

    loop = {
        "num_images": 16, "batch_size": 8, "log_every_images": 8, "checkpoint_every_images": 8, "warmup_images": 8,
        "sample_every_images": 16, "heldout_every_images": 16, "precision": "fp32", "ema_every_steps": 1,
    }  # fmt: skip
    changes = {
        "train": {
            "num_workers": 0,
            "num_heldout": 4,
            "loop": loop,
            "settings": {"num_probe": 1, "latents": "sample", "noise_offset": 0.1},
        }
    }
    config = replace(write_workspace(root, changes), device=device)
    job = TrainingJob(config, Folders.of(root, root / "work"))
    job.folders.work.mkdir()
    write_probe(job.folders.probe)
    print(f"train: device {train_stage.device_of(config)}")
    with Stage("train", root).progress(16, "images") as bar:
        train_stage.work(job, train_stage.Watcher(job, bar))
    groups, meta = CheckpointHome(job.folders.checkpoints).newest()
    found = {name: np.asarray(value) for name, value in groups["ema"].items()}
    return found | without_ties({f"last {name}": value for name, value in meta["heldout"][-1].items()})


def generated_workspace(root: Path, device: str) -> Path:
    """After the stage generate."""
    from raphael.generate import stage

    write_pipeline(root / "models/raphael")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["generate"] |= {"steps": 2, "batch_size": 3, "precision": "fp32"}
    params["evaluate"]["max_reference_images"] = 6
    write_pictures(root, ROOT)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "data/source").mkdir()
    prompts = [{"prompt": text, "suite": "single", "truth": None} for text in ("a red circle", "two stars", "a pond")]
    (root / "data/source/prompts.json").write_text(json.dumps({"prompts": prompts}))
    run_stage("generate", stage, root, device)
    return root


def pictures(folder: Path) -> Found:
    from PIL import Image

    return {file.name: np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))}


@case
def generate(root: Path, device: str) -> Found:
    return pictures(generated_workspace(root, device) / "data/generated")


@case
def evaluate(root: Path, device: str) -> Found:
    from raphael.base.config.params import load_config
    from raphael.base.stage import Stage, device_of
    from raphael.evaluate import stage
    from raphael.evaluate.catalogue import metrics_named
    from raphael.evaluate.metric import measure
    from raphael.evaluate.metrics.of_prompts import cosines
    from raphael.evaluate.protocols.workspace import Workspace

    generated_workspace(root, device)
    config = replace(load_config(root / "params.yaml"), device=device)
    entries = json.loads((root / "data/generated/images.json").read_text())["images"]
    drawn = list(pictures(root / "data/generated").values())
    print(f"evaluate: device {device_of(config)}")
    protocol = stage.protocol_of(config, root / "models/raphael")
    subject = Workspace(config, Stage("evaluate", root), protocol, entries, drawn, root / "models/raphael")
    found = measure(metrics_named(["frechet", "clip_score"]), subject).flat()
    told = {name: found[name] for name in ("fd_clip_self_3", "clip_score_self")}
    return told | {"cosines": cosines(subject, subject.clips[0])}


def write_probe(file: Path) -> Path:
    from data_pipeline.source.scene_probe import probe_set

    file.parent.mkdir(parents=True, exist_ok=True)
    probe_set(0, 2, 32, 0.12, ()).write(file)
    return file


def without_ties(numbers: Found) -> Found:
    """A random network is often as sure of a wrong caption as of the true one: there rounding tosses a coin."""
    return {name: value for name, value in numbers.items() if value is not None and "probe/" not in name}


@case
def instruments(root: Path, device: str) -> Found:
    """Of the stage evaluate: the ceilings, the probe, the knock-outs, the swap."""
    from raphael.base.config.params import load_config
    from raphael.base.stage import Stage
    from raphael.evaluate import stage
    from raphael.evaluate.catalogue import metrics_named
    from raphael.evaluate.instruments.measured import INSTRUMENTS, tracked
    from raphael.evaluate.metric import measure
    from raphael.evaluate.protocols.workspace import Workspace

    model, whole = write_pipeline(root / "models/raphael"), load_config(ROOT / "params.yaml")
    settings = replace(whole.evaluate, num_probe=1, num_knockout_images=2, num_swaps=1)
    config = replace(whole, evaluate=settings, device=device)
    subject = Workspace(config, Stage("evaluate", root), stage.protocol_of(config, model), [], [], model)
    subject.drawn = write_probe(root / "data/source/probe.npz")
    return without_ties(tracked(measure(metrics_named(INSTRUMENTS), subject).facts))


@case
def report_page(root: Path, device: str) -> Found:
    from raphael.base.stage import device_of
    from raphael.evaluate.report import page

    page.device_of = device_of  # the door has it
    run_stage("report", page, generated_workspace(root, device), device)
    return report(root, "report", "kept", "total")


def command(*arguments: str) -> None:
    from raphael.cli.main import main

    assert main(list(map(str, arguments))) == 0


@case
def command_generate(root: Path, device: str) -> Found:
    write_pipeline(root / "model")
    asked = ["--checkpoint", root / "model", "--device", device, "--steps", 2]
    command("generate", "a red circle", "two stars", *asked, "--show-edges", "--out", root / "out")
    (root / "list.txt").write_text("a pond\na cat")
    command("generate", "--prompts", root / "list.txt", *asked, "--precision", "bf16", "--out", root / "file")
    assert json.loads((root / "file/images.json").read_text())["settings"]["precision"] == "bf16"
    assert "precision" not in json.loads((root / "out/images.json").read_text())["settings"]
    assert len(list((root / "out/inside").glob("*.png"))) == 2
    return pictures(root / "out") | {f"bf16 {name}": picture for name, picture in pictures(root / "file").items()}


@case
def command_routes_and_figures(root: Path, device: str) -> Found:
    write_pipeline(root / "model")
    asked = ["--checkpoint", root / "model", "--device", device]
    command("routes", "a red circle", *asked, "--out", root / "routes.json")
    command("figures", *asked, "--out", root / "figures", "--num-words", 4)
    found = json.loads((root / "routes.json").read_text())
    return {"words": [entry["experts"] for entry in found["words"]], "times": found["times"]["experts"]}


@case
def command_paths(root: Path, device: str) -> Found:
    from raphael.evaluate.studies import path_report
    from raphael.evaluate.studies.paths import WordSet

    write_pipeline(root / "model")
    few = WordSet(
        ("red", "blue", "green"), tuple(f"{number} {{}} boxes" for number in "one two three four five".split())
    )
    path_report.load_words = lambda: {"adjectives": few}
    for chart in ("accuracy_chart", "confusion_chart", "time_route_chart", "word_map"):
        setattr(path_report, chart, lambda *_: None)
    path_report.section = lambda *_: ""
    command("paths", root / "model", "--device", device, "--untrained", 2, "--rounds", 1, "--out", root / "out")
    return {"accuracy": json.loads((root / "out/paths.json").read_text())["kinds"]["adjectives"]["trained"]["accuracy"]}


@case
def command_evaluate(root: Path, device: str) -> Found:
    from raphael.evaluate.protocols import folders

    folders.log_report = None
    write_pipeline(root / "model")
    for name, seed in (("a", 0), ("b", 1)):
        (root / name).mkdir()
        from PIL import Image

        for number in range(6):
            pixels = np.random.default_rng(10 * seed + number).integers(0, 256, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "prompts.txt").write_text("\n".join(f"thing {number}" for number in range(6)))
    from raphael.evaluate.protocols import tracked

    tracked.log_report = lambda *_: "not tracked"
    asked = ["--images", root / "a", "--reference", root / "b", "--features", root / "model/text_encoder"]
    told = ["--prompts", root / "prompts.txt", "--guidance-scale", 4, "--sampler", "ddim", "--steps", 9]
    command("evaluate", *asked, *told, "--device", device, "--cache", root / "cache", "--out", root / "out.json")
    return {number["name"]: number["value"] for number in json.loads((root / "out.json").read_text())["numbers"]}


@case
def timestep_loss(root: Path, device: str) -> Found:

    from raphael.base.devices import resolve
    from raphael.evaluate.instruments.timestep_loss import timestep_losses
    from raphael.generate.pipeline import RaphaelPipeline

    pipeline = RaphaelPipeline.from_pretrained(write_pipeline(root / "model"), device=resolve(device))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    return {"losses": timestep_losses(pipeline, images, ["a red circle", "two stars"], bins=2).cpu()}
