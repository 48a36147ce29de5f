"""A workspace: the pipeline's code with its own settings and data."""

from flows.workspace.folder import OVERLAYS, PROJECT, fingerprint, make_workspace

__all__ = ["OVERLAYS", "PROJECT", "fingerprint", "make_workspace"]
