"""Plain PNG files by Kornia's decoder: Pillow's pixels in half of its time, and memory-safe for hostile files."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from kornia_rs.io import decode_image_png_u8

# https://www.w3.org/TR/png-3/#5DataRep: signature; of the first chunk length, name, width, height, bit depth, colour
# type and three methods, the last of which is interlacing; and its checksum.
_BEGINNING = struct.Struct(">8sI4sIIBBBBB4x")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CHECKSUM = 4
# Chunks that change no pixel. What may turn the picture, make it move or see through is Pillow's to know.
_HARMLESS = frozenset((b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"bKGD", b"pHYs", b"tIME"))
# Bytes that a file may have beyond twice those of its pixels; more is not for memory.
_SPARE = 2**16


def read_plain_png(path: Path, max_pixels: int) -> np.ndarray | None:
    """Decode a PNG of 8 bit grey, RGB or RGBA without anything that asks for more than its pixels.

    Damage is told by the chunks' checksums. The one within the compressed pixels is not compared, so a file that was
    altered before its chunks' were reckoned is read, where Pillow refuses it.

    Returns:
        uint8 [H, W], [H, W, 3] or [H, W, 4]; None where the file is another, damaged, or larger: Pillow can say how.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING.size)
        if len(beginning) < _BEGINNING.size:
            return None
        signature, _, name, width, height, depth, colour, *_, interlaced = _BEGINNING.unpack(beginning)
        kind = _KINDS.get((depth, colour))
        if (signature, name, interlaced) != (_SIGNATURE, b"IHDR", 0) or kind is None or width * height > max_pixels:
            return None
        mode, channels = kind
        most = 2 * width * height * channels + _SPARE
        data = beginning + file.read(most)
    if len(data) > most or not _HARMLESS.issuperset(_names(data)):
        return None
    try:
        pixels = decode_image_png_u8(data, (height, width), mode)
    except Exception:  # kornia_rs has none of its own
        return None
    return pixels[..., 0] if channels == 1 else pixels


def _names(data: bytes) -> Iterator[bytes]:
    """Yield the names of a PNG's chunks after the first."""
    place = _BEGINNING.size
    while place + _CHUNK.size <= len(data):
        length, name = _CHUNK.unpack_from(data, place)
        yield name
        place += _CHUNK.size + length + _CHECKSUM


_KINDS: Mapping[tuple[int, int], tuple[str, int]] = MappingProxyType(
    {(8, 0): ("mono", 1), (8, 2): ("rgb", 3), (8, 6): ("rgba", 4)}
)
