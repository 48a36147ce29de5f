"""Settings of a T5 that is trained here: `clip.t5` of params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from raphael.base.config.data import Count
from raphael.base.strict import Range


@dataclass(frozen=True)
class T5Config:
    """A T5 that is trained here, on captions alone (raphael/encoders/t5)."""

    width: Count = 128
    heads: Count = 4
    hidden: Count = 256  # of its feed-forwards
    layers: Count = 2  # of the encoder; the decoder, which is thrown away, has one
    vocabulary: Annotated[int, Range(64)] = 512  # pieces at most, of the unigram tokenizer
    corrupted_share: Annotated[float, Range(0.01, 0.9)] = 0.3  # of a caption's tokens; T5's 0.15 is of 512
    mean_span: Annotated[float, Range(1)] = 2.0  # tokens

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width: got {self.width}, expected a multiple of heads {self.heads}")
