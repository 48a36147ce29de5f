"""Small weights of our own that generate at once, a pipeline folder each, and how a model's name is found."""
