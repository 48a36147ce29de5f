"""One training on many workers: how the work is spread, how workers are started, watched and lost."""
