"""Editing, and looking inside: what acts on a trained model while it samples. Nothing here trains.

Each edit is a function of a pipeline that returns an `Edited` (run.py): source, result, result without the edit. They
are wrappers of the Denoiser (switch.py, known.py) and hooks of attention (attention.py, paint.py).
"""
