"""GLIDE (arXiv 2112.10741): a base network of pixels and one that enlarges, each with a text transformer of its own."""
