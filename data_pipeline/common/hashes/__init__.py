"""Hashes of images: of what is seen, and lists of those that nobody may have."""
