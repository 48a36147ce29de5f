"""Trained models over HTTP: an API, and the page that uses it."""
