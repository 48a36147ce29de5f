"""Servers and deployments: `make up`, `make down`."""
