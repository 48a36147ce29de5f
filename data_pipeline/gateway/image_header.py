"""What an image's bytes say: format and size, without decoding a pixel (0.02 ms where a bomb's decoding takes 11 s).

A header is believed only where the decoder (OpenCV's, with libjpeg, libpng and libwebp) has no other way to read it.
libjpeg looks for the next marker where it does not find one, so that bytes which this reader takes for a segment may
hide another size from it: whatever would have to be skipped is refused here. What stands behind the end of an image
(cameras put previews there) is never read, by neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_HEADER_BYTES = 1 << 20  # EXIF and colour profiles may stand before the size; a megabyte of them is no image
MAX_SEGMENTS = 1024  # of a JPEG; a megabyte of EXIF and colour profile is 16
MAX_SCANS = 64  # of a JPEG: encoders write 10. Each costs a pass over all pixels, and may be eight bytes long

_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; lossless, arithmetic and hierarchical ones are refused
_SCAN, _END = 0xDA, 0xD9
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # Huffman, arithmetic, quantisation, restart, COM, APP
_FILL = re.compile(rb"\xff*")
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # not a stuffed zero, a restart marker or fill
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
_PNG_CHANNELS = {0: 1, 2: 4, 3: 4, 4: 4, 6: 4}  # as OpenCV decodes: RGB and palettes may have a transparent colour


class NotAnImage(ValueError):
    """The bytes are no JPEG, PNG, WebP or GIF, or the decoder might read them otherwise than this module."""


class TooManyScans(NotAnImage):
    """A JPEG of more than MAX_SCANS scans."""


@dataclass(frozen=True)
class Header:
    format: str  # "jpeg", "png", "webp", "gif"
    width_px: int
    height_px: int
    offset: int  # where the size stands: an image's end lies behind it
    pixel_bytes: int = 4  # of one decoded pixel: channels times bytes of a channel

    @property
    def decoded_bytes(self) -> int:
        return self.width_px * self.height_px * self.pixel_bytes


def read_header(data: bytes) -> Header | None:
    """Format and size; None where more bytes are needed. Raises NotAnImage."""
    if len(data) < 16:
        return None
    if data.startswith(b"\xff\xd8\xff"):
        header = _jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _webp(data)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        header = Header("gif", int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"), 6, 6)
    else:
        raise NotAnImage("unknown first bytes")
    if header is None and len(data) > MAX_HEADER_BYTES:
        raise NotAnImage("no size in the first megabyte")
    if header is not None and not (header.width_px and header.height_px):
        raise NotAnImage("a side of zero pixels")
    return header


def is_complete(header: Header, data: bytes) -> bool:
    """Whether the image's own end marker is there. Decoders fill what is missing with grey and say nothing.

    data: the whole body, whose header that is. Raises NotAnImage, TooManyScans.
    """
    if header.format == "jpeg":
        return _jpeg_is_complete(header, data)
    if header.format == "png":
        return _png_is_complete(data)
    if header.format == "webp":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return data.rstrip(b"\0").endswith(b";")


def _jpeg(data: bytes) -> Header | None:
    for marker, position, body in _segments(data, 2):
        if marker in _FRAMES:
            if len(body) < 6:
                return None
            height, width, channels = body[1:3], body[3:5], body[5]
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            if body[0] != 8 or channels not in (1, 3, 4) or length != 8 + 3 * channels:
                raise NotAnImage("JPEG of an unknown depth or number of channels")
            return Header("jpeg", int.from_bytes(width, "big"), int.from_bytes(height, "big"), position, channels)
        if marker in (_SCAN, _END):
            raise NotAnImage("JPEG data before its size")
    return None


def _jpeg_is_complete(header: Header, data: bytes) -> bool:
    frames = scans = 0
    for marker, _, _ in _segments(data, header.offset):
        frames += marker in _FRAMES
        scans += marker == _SCAN
        if frames > 1:
            raise NotAnImage("JPEG with a second frame")
        if scans > MAX_SCANS:
            raise TooManyScans(f"got more than {MAX_SCANS} scans")
        if marker == _END:
            return scans > 0
    return False


def _segments(data: bytes, position: int) -> Iterator[tuple[int, int, bytes]]:
    """(marker, position, first bytes of the content) of JPEG segments, to the end marker or to where the data end.

    Raises NotAnImage for whatever libjpeg would skip or stop at.
    """
    for _ in range(MAX_SEGMENTS):
        if position >= len(data):
            return
        code = _FILL.match(data, position).end()  # any number of 0xFF may stand before a marker's code
        if code == position:
            raise NotAnImage("bytes between JPEG segments")
        if code >= len(data):
            return
        marker, start = data[code], code - 1
        if marker == _END:
            yield marker, start, b""
            return
        if marker not in _TABLES and marker not in _FRAMES and marker != _SCAN:
            raise NotAnImage(f"JPEG marker FF {marker:02X} where none of its kind may stand")
        if code + 3 > len(data):
            return
        length = int.from_bytes(data[code + 1 : code + 3], "big")
        if length < 2:
            raise NotAnImage("JPEG segment of a length below 2")
        yield marker, start, data[code + 3 : code + min(length, 16) + 1]
        position = code + 1 + length
        if marker == _SCAN:
            following = _AFTER_SCAN.search(data, position)
            if following is None:
                return
            position = following.start()
    raise NotAnImage(f"got more than {MAX_SEGMENTS} JPEG segments")


def _png(data: bytes) -> Header | None:
    if len(data) < 29:
        return None
    if data[8:16] != b"\0\0\0\x0dIHDR":
        raise NotAnImage("PNG without IHDR")
    depth, colour, compression, filtering, interlacing = data[24:29]
    if depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlacing > 1:
        raise NotAnImage("PNG of an unknown colour type, depth or method")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return Header("png", width, height, 16, _PNG_CHANNELS[colour] * (2 if depth == 16 else 1))


def _png_is_complete(data: bytes) -> bool:
    """Chunk after chunk to the pixels, as OpenCV reads them itself before libpng does.

    Animated ones are refused: that code of OpenCV's is young and trusted frames' places until lately.
    """
    position = 33  # behind IHDR and its sum
    for _ in range(MAX_SEGMENTS):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if position + 12 + length > len(data):
            return False
        if kind == b"IDAT":
            return data.rfind(b"IEND") > position
        if kind in (b"IHDR", b"acTL", b"fcTL", b"fdAT") or not kind.isalpha():
            raise NotAnImage(f"PNG with a chunk {kind!a} before its pixels")
        position += 12 + length
    raise NotAnImage(f"got more than {MAX_SEGMENTS} PNG chunks before the pixels")


def _webp(data: bytes) -> Header | None:
    if len(data) < 32:  # OpenCV takes no shorter one
        return None
    kind, size = data[12:16], int.from_bytes(data[16:20], "little")
    if kind == b"VP8X":
        if size != 10:
            raise NotAnImage("WebP with a VP8X of another length than 10")
        pixel_bytes = 12 if data[20] & 2 else 4  # animated: two canvases more
        width, height = (1 + int.from_bytes(data[start : start + 3], "little") for start in (24, 27))
        return Header("webp", width, height, 24, pixel_bytes)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        if data[20] != 0x2F or bits >> 29:
            raise NotAnImage("WebP without the signature of VP8L")
        return Header("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 21)
    if kind == b"VP8 ":
        if data[20] & 1 or data[23:26] != b"\x9d\x01\x2a":
            raise NotAnImage("WebP without a key frame")
        width, height = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        return Header("webp", width & 0x3FFF, height & 0x3FFF, 26)
    raise NotAnImage("WebP of an unknown kind")
