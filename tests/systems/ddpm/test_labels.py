"""Labels as what the network is told: one-hot rows, the null label a row of zeros."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from truth.class_workspace import write_class_workspace

from raphael.base.checkpoint.folder import checkpoint_sha256, write_checkpoint
from raphael.base.config.preset import DiffusionConfig
from raphael.base.config.sampling import Sampling
from raphael.base.config.unet import PlainUNetConfig
from raphael.base.records import LABEL, NO_LABEL
from raphael.base.stage import StageError
from raphael.diffusion.sampling import generate_latents
from raphael.net.plain import PlainBlock
from raphael.net.unet import UNet
from raphael.systems.ddpm.labels import arranged, classes_of, named, told
from raphael.systems.ddpm.pipeline import DdpmPipeline
from raphael.systems.ddpm.training import build, described
from raphael.systems.job import Folders

CLASSES = ("circle", "square", "star")


def pipeline(classes=CLASSES) -> DdpmPipeline:
    torch.manual_seed(0)
    config = PlainUNetConfig(
        latent_channels=3, channels=(8, 16), res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4,
        vector_dim=len(classes),
    )  # fmt: skip
    unet = UNet(config, PlainBlock)
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    diffusion = DiffusionConfig(1000, "cosine", 1e-4, 0.02, "v", True)
    return DdpmPipeline(unet, diffusion, {"classes": list(classes), "picture": {"sizes_px": [[16, 16]]}})


@torch.no_grad()
def test_a_model_of_fewer_classes_draws_each_of_its_own_as_before_when_others_come_between() -> None:
    old, new, names = pipeline(), pipeline(("circle", "heart", "square", "star")), ["star", "", "circle", "square"]
    tensors = arranged(new.classes, old.unet.state_dict(), old.meta)
    new.unet.load_state_dict(tensors)
    x, t = torch.randn(4, 3, 16, 16), torch.full((4,), 500.0)
    mine, theirs = (one.unet(x, t, one.encode(names)).prediction for one in (new, old))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(mine[0], mine[2], atol=1e-3) and not tensors["vector_in.weight"][:, 1].any()
    same = arranged(old.classes, old.unet.state_dict(), old.meta)
    assert torch.equal(same["vector_in.weight"], old.unet.vector_in.weight)


def test_a_class_that_only_the_checkpoint_knows_is_refused_with_both_lists() -> None:
    old = pipeline()
    for mine, lost in ((("circle", "heart", "star"), "without square;"), ((), "records of none: without circle")):
        with pytest.raises(StageError, match=f"of the classes circle, square, star, and .*{lost}"):
            arranged(mine, old.unet.state_dict(), old.meta)


def test_a_training_begins_from_another_order_of_classes_by_their_names(tmp_path) -> None:
    config = write_class_workspace(tmp_path / "space")
    folders = Folders.of(tmp_path / "space", tmp_path / "work")
    first, _ = build(config, folders)
    with torch.no_grad():
        first.unet.vector_in.weight.normal_()
    turned = described(config, folders) | {"classes": described(config, folders)["classes"][::-1]}
    write_checkpoint(tmp_path / "model", {"ema": first.unet.state_dict()}, turned)
    init = {"init_from": str(tmp_path / "model"), "init_sha256": checkpoint_sha256(tmp_path / "model")}
    begun, _ = build(replace(config, train=replace(config.train, **init)), folders)
    assert torch.equal(begun.unet.vector_in.weight, first.unet.vector_in.weight.flip(1))
    assert torch.equal(begun.unet.conv_in.weight, first.unet.conv_in.weight)


def test_a_label_is_a_one_hot_row_and_none_is_a_row_of_zeros() -> None:
    batch = {LABEL: torch.tensor([2, NO_LABEL, 0], dtype=torch.int32)}
    assert told(3, batch, None).vector.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    dropped = told(3, batch, torch.tensor([True, False, False]))
    assert dropped.vector.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert told(0, {}, torch.tensor([True])).num_rows is None


def test_names_and_labels_are_told_alike() -> None:
    assert torch.equal(
        named(CLASSES, ["star", "", "circle"]).vector,
        told(3, {LABEL: torch.tensor([2, NO_LABEL, 0])}, None).vector,
    )
    assert classes_of({"label": {"classes": ["a", "b"]}}) == ("a", "b") and classes_of({}) == ()


def test_a_name_that_is_no_class_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="label: got 'sqare', expected circle, square, star; did you mean square?"):
        named(CLASSES, ["circle", "sqare"])


def test_guidance_is_between_the_class_and_the_null_label() -> None:
    """One step from infinite noise is the estimate of x_0 itself: D(null) + s (D(c) - D(null))."""
    parts = pipeline().parts()

    def drawn(name: str, scale: float) -> torch.Tensor:
        return generate_latents(parts, [name], [(0, 0)], Sampling("ddim", 1, scale))

    null, star = drawn("", 1.0), drawn("star", 1.0)
    assert not torch.equal(null, star)
    torch.testing.assert_close(drawn("star", 0.0), null, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn("star", 3.0), null + 3 * (star - null), rtol=1e-4, atol=1e-4)


def test_an_image_depends_on_its_own_class_and_seed_alone() -> None:
    parts, settings = pipeline().parts(), Sampling("ddpm", 3, 2.0)
    names, seeds = ["circle", "star", "", "square"], [(1, index) for index in range(4)]
    together = generate_latents(parts, names, seeds, settings)
    alone = torch.cat([generate_latents(parts, names[i : i + 2], seeds[i : i + 2], settings) for i in (0, 2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-3)


def test_pixels_are_bounded_by_a_static_threshold() -> None:
    images = pipeline()(["circle"] * 2, num_inference_steps=2, guidance_scale=9.0, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and images.min() >= 0 and images.max() <= 1


def test_it_has_nothing_to_show_of_its_inside_and_says_so() -> None:
    with pytest.raises(ValueError, match="collect: got true, expected false: the system ddpm"):
        pipeline()("star", num_inference_steps=1, collect=True)


def test_an_unconditional_model_needs_no_label() -> None:
    plain = pipeline(())
    one, other = (np.asarray(plain("", num_inference_steps=2, seed=seed).images[0]) for seed in (0, 1))
    assert one.shape == (16, 16, 3) and not np.array_equal(one, other)
