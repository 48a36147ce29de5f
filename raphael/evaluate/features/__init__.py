"""From folders of images to cached features."""
