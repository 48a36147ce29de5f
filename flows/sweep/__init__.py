"""Sweeps: settings of sampling and evaluation tried on trained models."""
