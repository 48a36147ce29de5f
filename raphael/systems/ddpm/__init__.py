"""DDPM (arXiv 2006.11239): images by a plain U-Net on pixels, unconditional or of a class."""
