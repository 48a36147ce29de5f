"""Images that are made to hurt whoever decodes them, and mutations of harmless ones."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
from PIL import Image

SIDE_PX = 32000


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def hidden_frame_jpeg(filler: bytes = b"\xff\x00") -> bytes:
    """A JPEG that says 64 x 64 to who takes `filler` for a segment, and 32000 x 32000 to libjpeg, which skips it.

    The pretended segment holds a whole image of the large size; the small one follows it.
    """
    small = encoded(Image.new("RGB", (64, 64)), "JPEG")
    frame = small.index(b"\xff\xc0")
    large = small[: frame + 5] + struct.pack(">HH", SIDE_PX, SIDE_PX) + small[frame + 9 :]
    return b"\xff\xd8" + filler + struct.pack(">H", 2 + len(large) - 2) + large[2:] + small[2:]


def many_scans_jpeg(side_px: int = 64, num_scans: int = 2000) -> bytes:
    """A progressive JPEG whose last scan is repeated, each time with no data: 12 bytes for a pass over all pixels."""
    whole = encoded(Image.new("L", (side_px, side_px), 90), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") :][:10]
    return whole[:-2] + (scan + b"\x55\x55") * num_scans + b"\xff\xd9"


def clearing_gif(num_bytes: int) -> bytes:
    """A GIF of 64 x 64 whose codes do nothing but clear the table: OpenCV makes it anew each time, 60 us for 3 bits."""
    head = b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + bytes(6)
    codes = np.packbits(np.tile([0, 0, 1], 8 * num_bytes // 3 + 8), bitorder="little").tobytes()[:num_bytes]
    blocks = b"".join(
        bytes([len(codes[start : start + 255])]) + codes[start : start + 255] for start in range(0, len(codes), 255)
    )
    return head + b"," + struct.pack("<HHHHB", 0, 0, 64, 64, 0) + b"\x02" + blocks + b"\0;"


def blank_png(width: int, height: int, channels: int = 4) -> bytes:
    """A whole PNG of zeros: a thousandth of what it takes decoded. channels: 4 (RGBA) or 3."""
    packer = zlib.compressobj(9)
    row = bytes(1 + channels * width)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, {4: 6, 3: 2}[channels], 0, 0, 0)
    chunks = [png_chunk(b"IHDR", head), png_chunk(b"IDAT", packed), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def animated_png() -> bytes:
    """Two frames; OpenCV has code of its own for these."""
    return encoded(Image.new("RGB", (9, 9)), "PNG", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])


def harmless() -> dict[str, list[bytes]]:
    """Small whole images of every admitted format, in the forms that encoders write. format -> files."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((26, 18), Image.Resampling.BICUBIC)
    alpha = colours.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (18, 26), np.uint8)))
    palette, grey = colours.convert("P"), colours.convert("L")
    other = colours.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    exif = Image.Exif()
    exif[0x010E] = "words " * 20
    about = {"exif": exif.tobytes(), "icc_profile": bytes(rng.integers(0, 256, 300, np.uint8))}
    series = {"save_all": True, "append_images": [other], "duration": 50}
    jpegs = [
        encoded(colours, "JPEG"), encoded(grey, "JPEG"), encoded(colours.convert("CMYK"), "JPEG"),
        encoded(colours, "JPEG", progressive=True), encoded(grey, "JPEG", progressive=True),
        encoded(colours, "JPEG", subsampling=0, comment=b"a comment", **about),
        encoded(colours, "JPEG", restart_marker_blocks=1), encoded(colours, "JPEG", optimize=True) + b"\xff\xd8 more",
    ]  # fmt: skip
    pngs = [
        encoded(colours, "PNG"), encoded(grey, "PNG"), encoded(alpha, "PNG"), encoded(palette, "PNG", transparency=3),
        encoded(grey.convert("LA"), "PNG"), encoded(grey.convert("1"), "PNG"), encoded(palette, "PNG", bits=4),
        encoded(grey.convert("I;16"), "PNG"), encoded(colours, "PNG", transparency=(1, 2, 3), **about),
    ]  # fmt: skip
    webps = [
        encoded(colours, "WEBP"), encoded(colours, "WEBP", lossless=True), encoded(alpha, "WEBP"),
        encoded(alpha, "WEBP", lossless=True), encoded(colours, "WEBP", **about), encoded(alpha, "WEBP", **series),
        encoded(colours, "WEBP", **series),
    ]  # fmt: skip
    gifs = [
        encoded(palette, "GIF"), encoded(palette, "GIF", interlace=0), encoded(palette, "GIF", transparency=1),
        encoded(palette, "GIF", **{**series, "append_images": [other.convert("P")], "disposal": 2}),
        encoded(grey, "GIF", comment=b"words"),
    ]  # fmt: skip
    return {"jpeg": jpegs, "png": pngs, "webp": webps, "gif": gifs}


def mutated(rng: random.Random, files: dict[str, list[bytes]]) -> tuple[str, bytes]:
    """(the mutations' names, bytes): a harmless file after one to three mutations; two thirds of them near its head."""
    kind = rng.choice(list(files))
    data, names = bytearray(rng.choice(files[kind])), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place = rng.randrange(min(len(data), rng.choice((40, 250, len(data)))) or 1) if data else 0
        change = rng.choice((_flip, _flip, _insert, _duplicate, _truncate, _length, _splice, _hide))
        change(rng, data, place, files[kind] if rng.random() < 0.8 else files[rng.choice(list(files))])
        names.append(change.__name__.strip("_"))
    if data[:4] == b"\x89PNG" and rng.random() < 0.8:  # or libpng looks at nothing but the wrong sum
        _mend_sums(data)
    return f"{kind}: {', '.join(names)}", bytes(data)


def _mend_sums(data: bytearray) -> None:
    place = 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4


def _flip(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 4))):
        if place < len(data):
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
        place += rng.randrange(1, 4)


def _insert(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    """A marker, a frame or a chunk."""
    size = struct.pack(">HH", rng.choice((1, 200, 600)), rng.choice((1, 200, 600)))
    frame = b"\xff" + bytes([rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9))]) + b"\0\x0b\x08" + size + b"\x01\x01\x11\0"
    wide = struct.pack(">IIBBBBB", rng.choice((1, 200, 600)), 300, 8, rng.choice((0, 2, 6)), 0, 0, 0)
    control = png_chunk(b"acTL", struct.pack(">II", 2, 0)) + png_chunk(b"fcTL", wide[:8].rjust(12, b"\0") + bytes(14))
    data[place:place] = rng.choice((
        b"\xff" + bytes([rng.randrange(256)]), b"\xff\x00", b"\xff" * rng.randrange(1, 9), b"\xff\xd8", b"\xff\xd9",
        b"\xff\xd8" + frame, frame, frame, b"\xff\xe1" + struct.pack(">H", rng.randrange(80)), bytes(rng.randrange(20)),
        rng.randbytes(rng.randrange(1, 30)), png_chunk(b"IHDR", wide), control, b"VP8X\n\0\0\0" + rng.randbytes(10),
        b"," + struct.pack("<HHHHB", 0, 0, 300, 300, 0),
    ))  # fmt: skip


def _duplicate(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    part = data[place : place + rng.choice((2, 4, 25, 60, 300))]
    where = rng.choice((place, place + len(part), rng.randrange(len(data) + 1)))
    data[where:where] = part


def _truncate(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    if rng.random() < 0.5:
        del data[rng.randrange(len(data) + 1) :]
    else:
        del data[place : place + rng.choice((1, 2, 4, 30))]


def _length(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    """A number of two, three or four bytes, in either order; where lengths and sizes stand as likely as anywhere."""
    markers = [index + 2 for index in range(len(data) - 4) if data[index] == 0xFF and data[index + 1] >= 0xC0]
    places = [place, *(markers and [rng.choice(markers)]), *rng.sample((4, 6, 8, 16, 18, 20, 24, 26, 27, 33), 3)]
    width, number = (
        rng.choice((2, 2, 3, 4)),
        rng.choice((0, 1, 2, 3, 8, 20, 255, 256, 600, 700, 16384, rng.getrandbits(16))),
    )
    start = rng.choice(places)
    data[start : start + width] = (number % (1 << 8 * width)).to_bytes(width, rng.choice(("big", "little")))


def _hide(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    """A whole image of another size, from behind its first bytes, in what may pass for a segment or chunk."""
    body = bytearray(rng.choice(files))
    frame = max(body.find(b"\xff" + bytes([code])) for code in (0xC0, 0xC1, 0xC2))
    for start, form in ((frame + 5, ">HH"), (16, ">II"), (6, "<HH"), (24, "<HBH"), (26, "<HH")):
        if body[:4] == {16: b"\x89PNG", 6: b"GIF8", 24: b"RIFF", 26: b"RIFF"}.get(start, b"\xff\xd8\xff\xe0"):
            struct.pack_into(form, body, start, *([300, 200] if len(form) == 3 else [300, 0, 200]))
    size = len(body) - 2
    marker = bytes([rng.choice((0, 1, 2, 0xBF, 0xD0, 0xD7, 0xDC, 0xE0, 0xF0, 0xFE, 0xFF, rng.randrange(256)))])
    segment = b"\xff" + marker + struct.pack(">H", size + rng.choice((0, 2, 2, 2))) + body[2:]
    chunk = (
        png_chunk(b"teXt", body[rng.choice((0, 8)) :])
        if rng.random() < 0.5
        else struct.pack("<4sI", b"EXIF", size) + body
    )
    jpeg = data[:2] == b"\xff\xd8"
    where = rng.choice((2, place)) if jpeg else rng.choice((12, 30, 33, place))
    data[where:where] = segment if jpeg else chunk


def _splice(rng: random.Random, data: bytearray, place: int, files: list[bytes]) -> None:
    other = rng.choice(files)
    data[place:] = other[rng.choice((place, rng.randrange(len(other)))) :]
