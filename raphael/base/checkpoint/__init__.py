"""Checkpoints: hashed tensors (parts), a folder of them (folder), the newest and the best of a training (home)."""
