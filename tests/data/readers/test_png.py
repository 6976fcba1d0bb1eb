"""PNG files: exact pixels, damage refused, and rare kinds of the format read."""

from __future__ import annotations

import inspect
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, PngImagePlugin

from fedsca_pipeline.data.readers import images
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.images import read_image

PLAIN = st.integers(1, 9).flatmap(
    lambda width: arrays(np.uint8, st.sampled_from([(7, width), (7, width, 3), (7, width, 4)]))
)
IN_A_FOLDER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def saved(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def read(path: Path, data: bytes) -> np.ndarray | None:
    """The pixels of a PNG, or None if it is refused."""
    path.write_bytes(data)
    try:
        return read_image(path)
    except BrokenSampleError:
        return None


@IN_A_FOLDER
@given(pixels=PLAIN, level=st.sampled_from([0, 1, 9]))
def test_plain_files_are_read_exactly(tmp_path: Path, pixels: np.ndarray, level: int) -> None:
    found = read(tmp_path / "a.png", saved(pixels, compress_level=level))

    assert found is not None
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels[..., :3] if pixels.ndim == 3 else pixels)


@IN_A_FOLDER
@given(pixels=PLAIN, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_files_never_give_other_pixels(
    tmp_path: Path, pixels: np.ndarray, place: float, bit: int, cut: bool
) -> None:
    data = bytearray(saved(pixels, compress_level=0))
    at = int(place * len(data))
    if cut:
        del data[at:]
    else:
        data[at] ^= 1 << bit
    found = read(tmp_path / "a.png", bytes(data))

    assert found is None or np.array_equal(found, pixels[..., :3] if pixels.ndim == 3 else pixels)


def interlaced(pixel: int) -> bytes:
    """One pixel is the same in seven passes as in one, so only the header has to say so."""
    data = saved(np.full((1, 1), pixel, np.uint8))
    header = b"IHDR" + data[16:28] + b"\1"
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def text(key: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, "\nexif\n0\n")
    return info


GREY = np.arange(35, dtype=np.uint8).reshape(5, 7)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(saved(GREY > 17), np.uint8(255) * (GREY > 17), id="one bit"),
        pytest.param(saved(GREY.astype(np.uint16)), GREY.astype(np.uint16), id="sixteen bit"),
        pytest.param(saved(GREY, transparency=3), GREY, id="a transparent grey"),
        pytest.param(saved(GREY, pnginfo=text("Raw profile type exif")), GREY, id="EXIF as text"),
        pytest.param(saved(GREY) + bytes(2**17), GREY, id="far longer than its pixels"),
        pytest.param(interlaced(7), np.full((1, 1), 7, np.uint8), id="interlaced"),
    ],
)
def test_rare_kinds_of_png_are_read_exactly(tmp_path: Path, data: bytes, expected: np.ndarray) -> None:
    found = read(tmp_path / "a.png", data)

    assert found is not None
    np.testing.assert_array_equal(found, expected)


def test_orientation_is_applied_wherever_it_stands_in_the_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    before = saved(GREY, exif=exif)
    at = before.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(before[at : at + 4], "big")
    last = before.index(b"IEND") - 4
    behind = before[:at] + before[end:last] + before[at:end] + before[last:]

    for name, data in {"before.png": before, "behind.png": behind}.items():
        found = read(tmp_path / name, data)
        assert found is not None
        np.testing.assert_array_equal(found, np.rot90(GREY, -1))


def test_more_pixels_than_allowed_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    # In this process, whose limit can be changed.
    monkeypatch.setattr(images, "decode_pixels", inspect.unwrap(images.decode_pixels))

    monkeypatch.setattr(images, "MAX_PIXELS", GREY.size)
    assert read(path, saved(GREY)) is not None
    monkeypatch.setattr(images, "MAX_PIXELS", GREY.size - 1)
    with pytest.raises(BrokenSampleError, match="decompression bomb"):
        read_image(path)
