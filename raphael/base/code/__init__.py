"""What code a stage uses, and the version number that stands for it."""
