"""The gateway: what may be fetched from the web, and how much of it."""

from data_pipeline.gateway.proxy import Policy, Refused, fetch

__all__ = ["Policy", "Refused", "fetch"]
