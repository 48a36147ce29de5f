"""Metrics as functions of features, and their intervals."""
