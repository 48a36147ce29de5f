"""Low-rank adapters of a pipeline: their files, what they add to a model, and how they are taken off again."""
