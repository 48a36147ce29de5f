"""Optimizers, learning rate, gradient clipping, EMA of weights."""
