"""Edits of an image that is there: image to image, inpainting, outpainting, objects removed.

A mask is True where the image is drawn anew. The estimate of x_0 is overwritten outside the mask at every step, which
needs no training (GLIDE, arXiv 2112.10741, section 2.4, describes it and why a network that was fine-tuned to see mask
and picture does better at the seam); a model with that input (`unet.inpainting`) is shown both besides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raphael.diffusion.denoiser import Denoiser
from raphael.diffusion.image_noise import noised
from raphael.edit.run import Edited, How, Session, check_share
from raphael.generate.pipeline import Pipeline
from raphael.net.condition import Condition
from raphael.net.inputs import known_picture

FEATHER_PX = 4  # how far around the mask drawn and known pixels are mixed


@dataclass(frozen=True)
class Known:
    """A Denoiser whose estimate is x0 wherever drawn is False: x0 (B, C, h, w), drawn (B, 1, h, w) bool.

    Every sampler of raphael/diffusion/samplers.py ends in its last estimate, so the result is x0 there to the bit.
    """

    denoiser: Denoiser
    x0: Tensor
    drawn: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition) -> Tensor:
        return torch.where(self.drawn, self.denoiser(x, sigma, cond), self.x0.to(x))


def image_to_image(
    pipeline: Pipeline,
    image: np.ndarray,
    prompt: str,
    strength: float = 0.6,
    how: How = How(),  # noqa: B008
) -> Edited:
    """SDEdit (arXiv 2108.01073): the image, noised as it is `strength` of the steps before the end, drawn from there.

    image: uint8 (H, W, 3), of the size that is drawn. Strength 0 is the image's own decoding, 1 is the prompt's image
    of the same seed to the bit. without: the prompt's image without the picture. Raises ValueError for a strength
    outside 0 to 1 and an image of another size.
    """
    check_share("strength", strength)
    session = Session(pipeline, how)
    latents = session.latents_of(image).expand(session.count, -1, -1, -1)
    first = session.settings.steps - round(strength * session.settings.steps)
    cond = session.condition(prompt)
    # from the first step on nothing of the picture is told, though some schedules end short of pure noise
    start = noised(latents, session.noise().start(), float(session.sigmas[first])) if first else None
    drawn = session.draw(cond, start=start, first=first)
    without = drawn if first == 0 else session.draw(cond, aside=True)
    facts = session.facts("image-to-image", prompt=prompt, strength=strength)
    labels = ("the picture", f"strength {strength:g}", "from noise alone")
    result = session.decode(drawn, cond)
    return Edited(_each(image, session), result, session.decode(without, cond), labels, facts)


def inpaint(
    pipeline: Pipeline,
    image: np.ndarray,
    mask: np.ndarray,
    prompt: str,
    how: How = How(),  # noqa: B008
    feather_px: int = FEATHER_PX,
    strength: float = 1.0,
) -> Edited:
    """Draw the masked part of an image anew, as the prompt says.

    image: uint8 (H, W, 3); mask: (H, W) bool, True where it is drawn. A latent is drawn where any of its pixels is.
    Outside the mask and a margin of feather_px the result is the image itself; within the margin the two are mixed.
    strength: below 1 the masked part begins as the ground continued into it (`filled`), noised as it is that share of
    the steps before the end: so an object is removed without another in its place. 0 is that continuation's decoding.
    without: the prompt's image of the same seed, which knows nothing of the picture. Raises ValueError for a mask that
    is empty, covers everything, or has another size, and a strength outside 0 to 1.
    """
    check_mask(mask, image)
    check_share("strength", strength)
    session = Session(pipeline.painting(), how)
    x0 = session.latents_of(filled(image, mask)).expand(session.count, -1, -1, -1)
    hole = latent_mask(mask, tuple(session.parts.latent_shape[1:])).to(session.device)

    def wrap(denoiser: Denoiser) -> Denoiser:
        return Known(denoiser, x0, hole)

    cond, sees = session.condition(prompt), session.parts.unet.config.inpainting
    shown_to = replace(cond, picture=known_picture(x0, (~hole).expand(session.count, -1, -1, -1))) if sees else cond
    first = session.settings.steps - round(strength * session.settings.steps)
    start = noised(x0, session.noise().start(), float(session.sigmas[first])) if first else None
    drawn = session.decode(session.draw(shown_to, wrap, start=start, first=first), cond)
    result = pasted(image, drawn, mask, feather_px)
    without = session.decode(session.draw(cond, aside=True), cond)
    share = round(float(mask.mean()), 6)
    told = {"feather_px": feather_px, "strength": strength, "drawn_share": share, "picture_in_input": sees}
    facts = session.facts("inpaint", prompt=prompt, **told)
    shown = {"drawn where white": _each(_grey(mask), session)}
    labels = ("the picture", prompt, "from noise alone")
    return Edited(_each(image, session), result, without, labels, facts, shown)


def outpaint(
    pipeline: Pipeline,
    image: np.ndarray,
    prompt: str,
    margins_px: tuple[int, int, int, int],
    how: How = How(),  # noqa: B008
) -> Edited:
    """Draw what lies around an image: margins_px (top, right, bottom, left), at least one above 0.

    The canvas, which is image and margins, sets the size that is drawn. source: the image with its border's pixels
    repeated, which is what the margins hold before they are drawn. Raises ValueError for margins below 0 or all 0, and
    a canvas whose size the network cannot draw.
    """
    top, right, bottom, left = margins_px
    if min(margins_px) < 0 or max(margins_px) == 0:
        raise ValueError(f"margins: got {margins_px} px, expected numbers from 0 with at least one above")
    canvas = np.pad(image, ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = np.ones(canvas.shape[:2], bool)
    mask[top : top + image.shape[0], left : left + image.shape[1]] = False
    sized = How(how.seed, how.num_images, how.sampling, how.negative_prompt, canvas.shape[:2])
    edited = inpaint(pipeline, canvas, mask, prompt, sized)
    edited.facts |= {"edit": "outpaint", "margins_px": list(margins_px)}
    return edited


def check_mask(mask: np.ndarray, image: np.ndarray) -> None:
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        height, width = image.shape[:2]
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(
            f"mask: got {got}, expected bool ({height}, {width}), the image's size, True where it is drawn"
        )
    if not mask.any():
        raise ValueError("mask: got an empty one, expected some pixels that are drawn anew (white)")
    if mask.all():
        raise ValueError("mask: got all of the image, expected some pixels that stay; without an image: generate")


def latent_mask(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(H, W) bool -> (1, 1, h, w) bool: True where any pixel is."""
    return F.adaptive_max_pool2d(torch.from_numpy(mask)[None, None].float(), size) > 0


def filled(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image, the masked part continued from around it (Telea 2004): uint8 (H, W, 3).

    A latent near the mask has read pixels inside it. Were they still the object's, the latents that are kept would ask
    for an object there, and a removed one came back.
    """
    import cv2

    around = cv2.inpaint(np.ascontiguousarray(image), mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    return np.where(mask[..., None], around, image)


def pasted(image: np.ndarray, drawn: np.ndarray, mask: np.ndarray, feather_px: int) -> np.ndarray:
    """drawn (n, H, W, 3) inside the mask, image (H, W, 3) outside its margin, mixed by distance between; uint8."""
    import cv2

    distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = np.clip(1 - distance / (feather_px + 1), 0, 1)[None, :, :, None]
    mixed = np.rint(share * drawn + (1 - share) * image).astype(np.uint8)
    return np.where(share > 0, mixed, image)


def _each(image: np.ndarray, session: Session) -> np.ndarray:
    return np.repeat(image[None], session.count, axis=0)


def _grey(mask: np.ndarray) -> np.ndarray:
    return np.repeat((mask * np.uint8(255))[:, :, None], 3, axis=2)
