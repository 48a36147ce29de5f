"""What the first bytes of a picture say: format and size, without decoding a pixel (0.02 ms where a bomb's decoding
takes 11 s).
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEADER_BYTES = 1 << 20  # EXIF and colour profiles may stand before the size; a megabyte of them is no picture
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG start-of-frame markers


class NotAPicture(ValueError):
    """The bytes are no JPEG, PNG, WebP or GIF, or their header makes no sense."""


@dataclass(frozen=True)
class Header:
    format: str  # "jpeg", "png", "webp", "gif"
    width_px: int
    height_px: int
    offset: int  # where the size stands: a picture's end lies behind it
    pixel_bytes: int = 4  # of one decoded pixel: channels times bytes of a channel

    @property
    def decoded_bytes(self) -> int:
        return self.width_px * self.height_px * self.pixel_bytes


def read_header(data: bytes) -> Header | None:
    """Format and size; None where more bytes are needed. Raises NotAPicture."""
    if len(data) < 16:
        return None
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _webp(data)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        header = Header("gif", int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"), 6)
    else:
        raise NotAPicture("unknown first bytes")
    if header is None and len(data) > MAX_HEADER_BYTES:
        raise NotAPicture("no size in the first megabyte")
    if header is not None and not (header.width_px and header.height_px):
        raise NotAPicture("a side of zero pixels")
    return header


def is_complete(header: Header, data: bytes) -> bool:
    """Whether the picture's own end marker is there. Decoders fill what is missing with grey and say nothing."""
    if header.format == "jpeg":
        return data.rfind(b"\xff\xd9") > header.offset
    if header.format == "png":
        return data.rfind(b"IEND") > header.offset
    if header.format == "webp":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return data.rstrip(b"\0").endswith(b";")


def _jpeg(data: bytes) -> Header | None:
    position = 2
    while True:
        while position < len(data) and data[position] == 0xFF and data[position + 1 : position + 2] == b"\xff":
            position += 1  # fill bytes
        if position + 9 > len(data):
            return None
        if data[position] != 0xFF:
            raise NotAPicture("broken JPEG segments")
        marker = data[position + 1]
        if marker in _FRAMES:
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            channels = data[position + 9] if position + 9 < len(data) else 4
            return Header("jpeg", int.from_bytes(width, "big"), int.from_bytes(height, "big"), position, channels)
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        if marker in (0xD9, 0xDA):
            raise NotAPicture("JPEG data before its size")
        position += 2 + max(int.from_bytes(data[position + 2 : position + 4], "big"), 2)


def _png(data: bytes) -> Header | None:
    if len(data) < 29:
        return None
    if data[12:16] != b"IHDR":
        raise NotAPicture("PNG without IHDR")
    channels = {0: 1, 2: 3, 3: 4, 4: 2, 6: 4}.get(data[25])  # 3: a palette, which may hold transparency
    if channels is None or data[24] not in (1, 2, 4, 8, 16):
        raise NotAPicture("PNG of an unknown colour type or depth")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return Header("png", width, height, 16, channels * (2 if data[24] == 16 else 1))


def _webp(data: bytes) -> Header | None:
    if len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return Header("webp", 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"), 24)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return Header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 21)
    if kind == b"VP8 ":
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return Header("webp", width & 0x3FFF, height & 0x3FFF, 26)
    raise NotAPicture("WebP of an unknown kind")
