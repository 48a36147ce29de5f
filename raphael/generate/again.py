"""`raphael generate --from picture.png`: the same pixels from what the picture says of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raphael.base.stage import StageError
from raphael.generate.metadata import Made, picture_sha256

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from raphael.systems.pipeline import Pipeline


def make_again(
    pipeline: Pipeline, made: Made, picture: np.ndarray | None = None, guidance: str | None = None
) -> Image.Image:
    """Samples the whole batch that the picture stood in.

    picture: what image to image began from, uint8 (H, W, 3), at the size that was drawn. guidance: the guide that it
    followed. Raises StageError where another model made it, or it began from another picture or followed another guide.
    """
    import torch
    from PIL import Image

    from raphael.diffusion.image_noise import ImageNoise
    from raphael.diffusion.sampling import Order, decode_images, encode_texts, sample_order
    from raphael.systems.guides.guide import guided, load_guide
    from raphael.systems.request import Origin

    if made.model != pipeline.identity:
        raise StageError(
            f"--from: the picture was made by model {made.model}, got {pipeline.identity}; name its model with "
            "--checkpoint, and its adapters with --lora"
        )
    expect_picture(made, picture)
    guide = None if guidance is None else load_guide(guidance)
    expect_guide(made, "" if guide is None else guide.name)
    times = pipeline.downsampling if made.sampling.until == "base" else 1  # the size of the whole cascade's images
    height, width = (times * side for side in made.size_px)
    parts = pipeline.parts(height, width, pipeline.reader(made.sampling, weighted=not made.as_written))
    parts = guided(pipeline, parts, guide, made.guidance_weight if guide else None)
    noise, levels = ImageNoise(made.image_seeds, parts.latent_shape, pipeline.device), None
    if picture is not None:
        origin = Origin(pipeline.latents_of(picture, parts), made.strength)
        noise, levels = origin.begun(noise, parts.schedule.sampling_sigmas(made.sampling.steps), slice(None))
    with torch.inference_mode():
        cond, null = encode_texts(parts, list(made.batch)), encode_texts(parts, [made.negative_prompt])
    wrap = parts.guide(list(made.batch)) if parts.guide else None
    images = decode_images(parts, sample_order(parts, Order(cond, null, noise, made.sampling, levels, wrap=wrap)))
    return Image.fromarray(images[made.row])


def expect_picture(made: Made, picture: np.ndarray | None) -> None:
    """Raises StageError unless the picture is the one that it began from."""
    found = "" if picture is None else picture_sha256(picture)
    if found == made.image_sha256:
        return
    if not made.image_sha256:
        raise StageError("--image: got it with --from of a picture that began from none, expected it left out")
    got = f"pixels {found[:16]}" if found else "no --image"
    raise StageError(f"--from: got {got}, expected the picture that it began from, pixels {made.image_sha256[:16]}")


def expect_guide(made: Made, found: str) -> None:
    """Raises StageError unless the guide is the one that it followed. found: kind:identity, "" for none."""
    if found == made.guidance:
        return
    if not made.guidance:
        raise StageError("--guidance: got it with --from of a picture that followed no guide, expected it left out")
    raise StageError(f"--from: got {found or 'no --guidance'}, expected the guide that it followed, {made.guidance}")
