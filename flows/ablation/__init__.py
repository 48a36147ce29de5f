"""Ablations: arms and seeds of a plan, trained and compared."""
