"""raphael.evaluate.metrics.frechet.frechet_distance, from where it lies now."""

from raphael.evaluate.metrics.frechet import frechet_distance

__all__ = ["frechet_distance"]
