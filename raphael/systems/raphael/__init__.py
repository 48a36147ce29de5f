"""RAPHAEL (arXiv 2305.18295), put together from the layers below."""
