"""Guides: a classifier or a CLIP of noised images that turns the sampling of any system towards what is asked of it."""
