"""Imagen (arXiv 2205.11487): a frozen T5, a base network of pixels and an Efficient U-Net that enlarges its images."""
