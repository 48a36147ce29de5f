"""Stage `captions`: clean captions."""

from data_pipeline.common.caption_rules import clean

__all__ = ["clean"]
