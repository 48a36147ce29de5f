"""Addresses of object stores, as settings have them."""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "file")


def check_address(address: str) -> None:
    """Raises ValueError for what is no address of a store."""
    parts = urlsplit(address)
    there = parts.path.startswith("/") if parts.scheme == "file" else parts.netloc
    if parts.scheme not in SCHEMES or not there or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(
            f"got {address!r}, expected s3://bucket/prefix, gs://bucket/prefix or file:///folder; credentials come "
            "from the environment (AWS_ACCESS_KEY_ID and so on), never from an address"
        )
