"""Whether the bytes of an image are taken at all, in the words of the reports: for the gateway, and for images that lie
here already."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.gateway.image_header import Header, NotAnImage, TooManyScans, is_complete, read_header

EMPTY, NOT_AN_IMAGE, TRUNCATED = "empty answer", "not a picture", "truncated"
TOO_MANY_BYTES, TOO_MANY_SCANS = "too many bytes", "too many scans"


@dataclass(frozen=True)
class BodyLimits:
    max_bytes: int
    max_pixels: int
    max_decoded_bytes: int

    def too_large(self, header: Header) -> str:
        """The reason, by what the header says; "" where it may be decoded."""
        if header.width_px * header.height_px > self.max_pixels:
            return "too many pixels"
        return "too many decoded bytes" if header.decoded_bytes > self.max_decoded_bytes else ""

    def refuses(self, body: bytes) -> str:
        """Of a body that is here: why it is not decoded, "" where it is."""
        if not body:
            return EMPTY
        if len(body) > self.max_bytes:
            return TOO_MANY_BYTES
        try:
            header = read_header(body)
        except NotAnImage:
            return NOT_AN_IMAGE
        if header is None:
            return NOT_AN_IMAGE
        return self.too_large(header) or not_whole(header, body)


def not_whole(header: Header, body: bytes) -> str:
    """The reason for which a body, whose header that is, is no whole image; "" where it is."""
    try:
        return "" if is_complete(header, body) else TRUNCATED
    except TooManyScans:
        return TOO_MANY_SCANS
    except NotAnImage:
        return NOT_AN_IMAGE
