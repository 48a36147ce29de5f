"""Images of every mode that may come from the web, each with the colours that a person sees in its four quarters."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from attacks.images import encoded, png_chunk
from PIL import Image

QUARTERS = np.array([[(200, 60, 20), (30, 160, 90)], [(90, 40, 180), (240, 240, 240)]], float)  # (2, 2, 3)
GREYS = np.array([[60, 130], [200, 5]], float)  # (2, 2)
SIDE = 32  # px, of a quarter: more than what a JPEG's blocks smear
D50 = (0.9642, 1.0, 0.8249)
ADOBE = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]  # XYZ of r, g, b at D50
SRGB_FROM_XYZ = np.linalg.inv(  # Lindbloom, sRGB at D50
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)


@dataclass(frozen=True)
class Case:
    """seen: float (2, 2, 3), upright. stored: the same where profiles are not obeyed. loss: of its own format."""

    name: str
    body: bytes
    seen: np.ndarray
    stored: np.ndarray
    loss: float = 1.0


def spread(quarters: np.ndarray, kind: type = np.uint8) -> np.ndarray:
    """(2, 2, ...) -> every quarter SIDE x SIDE px."""
    return np.repeat(np.repeat(np.asarray(quarters).round().astype(kind), SIDE, 0), SIDE, 1)


def in_quarters(pixels: np.ndarray) -> np.ndarray:
    """Means of the four quarters, without their borders: (2, 2, 3)."""
    pixels = pixels.astype(float).reshape(*pixels.shape[:2], -1)
    half, edge = (side // 2 for side in pixels.shape[:2]), 8
    tall, wide = half
    rows, columns = [(edge, tall - edge), (tall + edge, -edge)], [(edge, wide - edge), (wide + edge, -edge)]
    return np.array([[pixels[a:b, c:d].mean((0, 1)) for c, d in columns] for a, b in rows])


def over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    return colours * opacity[..., None] + 255 * (1 - opacity[..., None])


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def png(width: int, height: int, depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """rows: the samples, big-endian where they have 16 bits; (height, bytes of a row)."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def deep_png(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """uint16 (H, W) or (H, W, 2 to 4) -> a PNG of 16 bits."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2] if values.ndim == 3 else 1]
    height, width = values.shape[:2]
    return png(width, height, 16, colour, values.astype(">u2").reshape(height, -1).view(np.uint8), *chunks)


def icc(space: bytes, tags: dict[bytes, bytes], pcs: bytes = b"XYZ ", kind: bytes = b"mntr") -> bytes:
    """An ICC profile of version 2."""
    words = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79)
    tags = {b"desc": words, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": xyz(D50), **tags}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(data), b"none", 0x02400000, kind, space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(D50)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data


def fixed(numbers: tuple[float, ...]) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def xyz(numbers: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + fixed(numbers)


def gamma(power: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(power * 256))


def adobe_profile(power: float = 2.2) -> bytes:
    columns = {name: xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), ADOBE, strict=True)}
    return icc(b"RGB ", {**columns, b"rTRC": gamma(power), b"gTRC": gamma(power), b"bTRC": gamma(power)})


def grey_profile(power: float) -> bytes:
    return icc(b"GRAY", {b"kTRC": gamma(power)})


def black_ink_profile() -> bytes:
    """CMYK whose lightness falls evenly with the black ink, and to nothing with any other."""
    corners = [(0, 128, 128) if c or m or y or k else (255, 128, 128) for c in (0, 1) for m in (0, 1) for y in (0, 1)
               for k in (0, 1)]  # fmt: skip
    ramp = bytes(range(256))
    matrix = fixed((1, 0, 0, 0, 1, 0, 0, 0, 1))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + 4 * ramp + bytes(sum(corners, ())) + 3 * ramp
    return icc(b"CMYK", {b"A2B0": lut}, pcs=b"Lab ", kind=b"prtr")


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light 0 to 1 -> 0 to 255 (IEC 61966-2-1)."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def adobe_seen(values: np.ndarray, power: float = 2.2) -> np.ndarray:
    return to_srgb((values / 255) ** power @ np.array(ADOBE) @ SRGB_FROM_XYZ.T)


def black_ink_seen(ink: np.ndarray) -> np.ndarray:
    lightness = 100 * (1 - ink / 255)  # CIE 1976
    share = (lightness + 16) / 116
    return to_srgb(np.where(share > 6 / 29, share**3, 3 * (6 / 29) ** 2 * (share - 4 / 29)))


def turned(body: Image.Image, orientation: int) -> Image.Image:
    """As the camera stores what is seen as `body`: the inverse of EXIF's transposition, one by one."""
    T = Image.Transpose
    turns = [T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE, T.ROTATE_270]
    return body if orientation == 1 else body.transpose(turns[orientation - 2])


def cases() -> list[Case]:
    return [*_plain(), *_deep(), *_transparent(), *_inks(), *_profiled(), *_oriented()]


def _case(name: str, body: bytes, seen: np.ndarray, stored: np.ndarray | None = None, loss: float = 1.0) -> Case:
    return Case(name, body, seen, seen if stored is None else stored, loss)


def _plain() -> list[Case]:
    rgb, light = Image.fromarray(spread(QUARTERS)), Image.fromarray(spread(GREYS))
    bits = np.array([[0.0, 255.0], [255.0, 0.0]])
    found = [_case(f"RGB {form}", encoded(rgb, form, lossless=True), QUARTERS) for form in ("PNG", "WEBP")]
    found += [
        _case("RGB JPEG", encoded(rgb, "JPEG", quality=95), QUARTERS, loss=3),
        _case("L PNG", encoded(light, "PNG"), grey(GREYS)),
        _case("L JPEG", encoded(light, "JPEG", quality=95), grey(GREYS), loss=2),
        _case("1 PNG", encoded(Image.fromarray(spread(bits)).convert("1"), "PNG"), grey(bits)),
        _case("P PNG", encoded(rgb.quantize(4, dither=0), "PNG"), QUARTERS),
    ]
    for depth in (2, 4):  # a palette and a grey of few bits
        levels = np.array([[0, 1], [2, 3]]) * (1 if depth == 2 else 5)
        samples = spread(levels)
        packed = np.packbits(np.unpackbits(samples[..., None], axis=-1)[..., 8 - depth :].reshape(len(samples), -1), -1)
        packed = packed.reshape(len(samples), -1)
        scale = 255 / (2**depth - 1)
        found.append(_case(f"L of {depth} bits PNG", png(2 * SIDE, 2 * SIDE, depth, 0, packed), grey(levels * scale)))
    return found


def _deep() -> list[Case]:
    """16 bits: v / 257, for 65535 is white."""
    opacity = np.array([[1.0, 0.4], [0.0, 0.7]])
    depth = 257 * np.concatenate([QUARTERS, 255 * opacity[..., None]], -1)
    greys = np.stack([GREYS, 255 * opacity], -1) * 257
    clear = struct.pack(">H", round(130 * 257))
    seen = grey(np.array([[60, 255], [200, 5]], float))
    return [
        _case("I;16 PNG", deep_png(spread(GREYS * 257, np.uint16)), grey(GREYS)),
        _case("I;16 PNG, near black", deep_png(spread(GREYS, np.uint16)), np.zeros((2, 2, 3))),
        _case("I;16 PNG, one grey clear", deep_png(spread(GREYS * 257, np.uint16), (b"tRNS", clear)), seen),
        _case("RGB of 16 bits PNG", deep_png(spread(depth[..., :3], np.uint16)), QUARTERS),
        _case("RGBA of 16 bits PNG", deep_png(spread(depth, np.uint16)), over_white(QUARTERS, opacity), loss=2),
        _case("LA of 16 bits PNG", deep_png(spread(greys, np.uint16)), over_white(grey(GREYS), opacity), loss=2),
    ]


def _transparent() -> list[Case]:
    opacity = np.array([[1.0, 0.4], [0.0, 0.7]])
    whole = np.concatenate([QUARTERS, 255 * opacity[..., None]], -1)
    rgba, la = Image.fromarray(spread(whole)), Image.fromarray(spread(np.stack([GREYS, 255 * opacity], -1)), "LA")
    rgb = Image.fromarray(spread(QUARTERS))
    palette, light = rgb.quantize(4, dither=0), Image.fromarray(spread(GREYS))
    seen = over_white(QUARTERS, opacity)
    first = over_white(QUARTERS, np.array([[0.0, 1], [1, 1]]))
    return [
        _case("RGBA PNG", encoded(rgba, "PNG"), seen, loss=2),
        _case("RGBA WEBP", encoded(rgba, "WEBP", lossless=True, exact=True), seen, loss=2),
        _case("LA PNG", encoded(la, "PNG"), over_white(grey(GREYS), opacity), loss=2),
        _case("P PNG, one colour clear", encoded(palette, "PNG", transparency=palette.getpixel((0, 0))), first),
        _case("RGB PNG, one colour clear", encoded(rgb, "PNG", transparency=(200, 60, 20)), first),
        _case(
            "L PNG, one grey clear", encoded(light, "PNG", transparency=60), grey(np.array([[255.0, 130], [200, 5]]))
        ),
    ]


def _inks() -> list[Case]:
    inks = np.array([[(10, 120, 200, 30), (0, 0, 0, 90)], [(200, 10, 0, 0), (0, 0, 0, 0)]], float)
    seen = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    adobe = encoded(Image.fromarray(spread(inks), "CMYK"), "JPEG", quality=98)
    place = adobe.index(b"\xff\xee")
    length = struct.unpack(">H", adobe[place + 2 : place + 4])[0]
    bare = (
        adobe[:place] + adobe[place + 2 + length :]
    )  # what is left of white is stored all the same: so browsers read it
    black = np.zeros((2, 2, 4))
    black[..., 3] = GREYS
    profiled = encoded(Image.fromarray(spread(black), "CMYK"), "JPEG", quality=98, icc_profile=black_ink_profile())
    return [
        _case("CMYK JPEG", adobe, seen, loss=4),
        _case("CMYK JPEG without Adobe's mark", bare, seen, loss=4),
        _case("CMYK JPEG with its profile", profiled, grey(black_ink_seen(GREYS)), grey(255 - GREYS), loss=4),
    ]


def _profiled() -> list[Case]:
    from PIL import ImageCms

    rgb, light = Image.fromarray(spread(QUARTERS)), Image.fromarray(spread(GREYS))
    adobe, seen = adobe_profile(), adobe_seen(QUARTERS)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    opacity = np.array([[1.0, 0.4], [0.0, 0.7]])
    rgba = Image.fromarray(spread(np.concatenate([QUARTERS, 255 * opacity[..., None]], -1)))
    steep, dark = grey_profile(1.2), to_srgb((GREYS / 255) ** 1.2)
    found = [
        _case(f"RGB {form} in Adobe RGB", encoded(rgb, form, **more, icc_profile=adobe), seen, QUARTERS, loss)
        for form, more, loss in (
            ("PNG", {}, 2.0), ("JPEG", {"quality": 98}, 4.0), ("WEBP", {"lossless": True}, 2.0),
        )
    ]  # fmt: skip
    found += [
        _case("RGB PNG in sRGB", encoded(rgb, "PNG", icc_profile=srgb), QUARTERS),
        _case("RGB PNG, broken profile", encoded(rgb, "PNG", icc_profile=adobe[:200]), QUARTERS),
        _case("RGB PNG, a grey's profile", encoded(rgb, "PNG", icc_profile=grey_profile(1.0)), QUARTERS),
        _case("L PNG with its profile", encoded(light, "PNG", icc_profile=steep), grey(dark), grey(GREYS), 3),
        _case("P PNG in Adobe RGB", encoded(rgb.quantize(4, dither=0), "PNG", icc_profile=adobe), seen, QUARTERS, 2),
        _case(
            "RGBA PNG in Adobe RGB", encoded(rgba, "PNG", icc_profile=adobe),
            over_white(seen, opacity), over_white(QUARTERS, opacity), 2,
        ),
        _case(
            "RGB of 16 bits PNG in Adobe RGB",
            deep_png(spread(257 * QUARTERS, np.uint16), (b"iCCP", b"x\0\0" + zlib.compress(adobe))), seen, QUARTERS, 2,
        ),
    ]  # fmt: skip
    return found


def _oriented() -> list[Case]:
    rgb, found = Image.fromarray(spread(QUARTERS)), []
    for form, more, loss in (
        ("PNG", {}, 1.0),
        ("JPEG", {"quality": 98}, 3.0),
        ("WEBP", {"lossless": True}, 1.0),
    ):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            body = encoded(turned(rgb, orientation), form, exif=exif, **more)
            found.append(_case(f"RGB {form}, orientation {orientation}", body, QUARTERS, loss=loss))
    exif[0x0112] = 6
    body = encoded(turned(rgb, 6), "PNG", exif=exif, icc_profile=adobe_profile())
    found.append(_case("RGB PNG, orientation 6, in Adobe RGB", body, adobe_seen(QUARTERS), QUARTERS, 2))
    return found


def opened(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body))
