"""The models behind the computed scores, loaded once: `scorer(images, captions) -> {score: float64 (n,)}`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raphael.base.stage import StageError
from raphael.encoders.aesthetic import load_head, similarity

if TYPE_CHECKING:
    from PIL import Image

    from raphael.base.config.data import ScoreConfig


class Scorer:
    """Computes what `settings` configures. CLIP embeds an image once, whichever heads look at it."""

    def __init__(self, settings: ScoreConfig, device: str = "cpu"):
        """Raises StageError, one line, for weights that are missing, broken or of another CLIP's width."""
        from data_pipeline.score.watermark_net import load_watermark
        from raphael.encoders.image import load_clip

        self.device = device
        self.similar = settings.similarity
        self.watermark = load_watermark(settings.watermark, self.device) if settings.watermark else None
        heads = {"aesthetic": settings.aesthetic, "unsafe": settings.unsafe}
        self.heads = {name: load_head(path, self.device) for name, path in heads.items() if path}
        self.clip = load_clip(settings.clip).to(self.device) if self.heads or self.similar else None
        if "aesthetic" in self.heads and self.heads["aesthetic"].version == "v1" and not settings.replace:
            raise StageError(
                "score.aesthetic: got a V1 head, whose scale is another than that of the list's scores (V2), which it "
                "would fill up; take a V2 head, or set score.replace: true and filter.min_aesthetic on V1's scale"
            )

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, np.ndarray]:
        scores = {}
        if self.watermark:
            scores["watermark"] = self.watermark.scores(images)
        if self.clip is None:
            return scores
        embeddings = self.clip.embed_images(images)
        if self.similar:
            scores["similarity"] = similarity(embeddings, self.clip.embed_texts(captions)).double().cpu().numpy()
        for name, head in self.heads.items():
            try:
                values = head(embeddings).double().cpu()
            except ValueError as error:
                raise StageError(f"score.{name}: {error}; name the CLIP it was trained on in score.clip") from None
            scores[name] = (values.sigmoid() if name == "unsafe" else values).numpy()
        return scores
