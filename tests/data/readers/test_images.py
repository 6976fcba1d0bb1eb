"""Every format of the raw folders is read exactly, and damage is told apart from data."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsca_pipeline.data.readers import images as readers
from fedsca_pipeline.data.readers.common import BrokenSampleError, split_name
from fedsca_pipeline.data.readers.images import orientations_of, read_image, read_mask, read_mask_colours

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
DEEP = RNG.integers(0, 65_536, (12, 17), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
LABELS = RNG.integers(0, 3, (12, 17), dtype=np.uint8)


def png(pixels: np.ndarray, depth: int = 16) -> bytes:
    """A PNG of 2, 4 or 16 bits a sample and 1 to 4 channels, byte by byte as its standard says."""
    height, width, channels = pixels.shape
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in pixels]
    else:
        bits = np.unpackbits(pixels.reshape(height, width, 1).astype(np.uint8), axis=2)[:, :, 8 - depth :]
        rows = [np.packbits(row.ravel()).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "rgb"])
def test_eight_bit_images_are_read_exactly(tmp_path: Path, suffix: str, pixels: np.ndarray) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path)

    np.testing.assert_array_equal(read_image(path), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grey_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(DEEP).save(path)

    image = read_image(path)

    assert image.dtype == np.uint16
    np.testing.assert_array_equal(image, DEEP)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colour_png_keeps_all_bits_and_drops_alpha(tmp_path: Path, channels: int) -> None:
    pixels = RNG.integers(0, 65_536, (9, 11, channels), dtype=np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(png(pixels))

    np.testing.assert_array_equal(read_image(path), pixels[..., 0] if channels == 2 else pixels[..., :3])


@pytest.mark.parametrize(("mode", "expected"), [("RGBA", COLOUR), ("LA", GREY)])
def test_alpha_is_dropped(tmp_path: Path, mode: str, expected: np.ndarray) -> None:
    alpha = np.full(GREY.shape, 9, np.uint8)
    layers = [*np.moveaxis(expected, -1, 0), alpha] if expected.ndim == 3 else [expected, alpha]
    path = tmp_path / "a.png"
    Image.merge(mode, [Image.fromarray(np.ascontiguousarray(layer)) for layer in layers]).save(path)

    np.testing.assert_array_equal(read_image(path), expected)


def test_a_jpeg_is_read_in_its_mode(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / "grey.jpg")
    Image.new("CMYK", (8, 6)).save(tmp_path / "print.jpeg")

    assert read_image(tmp_path / "grey.jpg").shape == (8, 8)
    assert read_image(tmp_path / "print.jpeg").shape == (6, 8, 3)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, 16:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)

    upright = read_image(tmp_path / "a.jpg")

    assert upright.shape == (32, 16)
    assert upright[:8].max() < 20
    assert upright[-8:].min() > 235


def test_palettes_give_colours_in_images_and_indices_in_masks(tmp_path: Path) -> None:
    image = Image.new("P", LABELS.shape[::-1])
    image.putdata(LABELS.ravel().tolist())
    image.putpalette([0, 0, 0, 200, 10, 20, 30, 250, 40])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.tif")

    for name in ("a.png", "a.tif"):
        np.testing.assert_array_equal(read_mask(tmp_path / name), LABELS)
        colours = read_image(tmp_path / name)
        np.testing.assert_array_equal(colours[LABELS == 1][0], [200, 10, 20])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_one_bit_files_are_black_and_white_images_and_zero_one_masks(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(LABELS > 1).save(path)

    np.testing.assert_array_equal(read_image(path), (LABELS > 1) * 255)
    np.testing.assert_array_equal(read_mask(path) > 0, LABELS > 1)


@pytest.mark.parametrize("depth", [2, 4])
def test_low_depth_grey_masks_keep_their_stored_numbers(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(LABELS[..., None], depth))

    np.testing.assert_array_equal(read_mask(path), LABELS)
    assert read_image(path).max() == 2 * 255 // (2**depth - 1)


@pytest.mark.parametrize("value", [-1000.0, 0.25])
def test_signed_and_float_tiffs_are_images(tmp_path: Path, value: float) -> None:
    pixels = np.full((5, 6), value, np.int16 if value < -1 else np.float32)
    tifffile.imwrite(tmp_path / "a.tif", pixels)

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), pixels)


def test_planar_tiffs_are_turned_to_channels_last(tmp_path: Path) -> None:
    planes = np.ascontiguousarray(np.moveaxis(COLOUR, -1, 0))
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate")

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), COLOUR)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", None])
def test_compressed_tiffs_are_read_exactly(tmp_path: Path, compression: str | None) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.tif", compression=compression)

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), COLOUR)


def test_white_is_zero_tiffs_are_seen_as_viewers_show_them(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", 255 - GREY, photometric="miniswhite")

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), GREY)


def write_nan(path: Path) -> None:
    pixels = np.zeros((4, 4), np.float32)
    pixels[1, 2] = np.nan
    tifffile.imwrite(path, pixels)


def write_truncated_png(path: Path) -> None:
    Image.fromarray(COLOUR).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def write_truncated_tiff(path: Path) -> None:
    tifffile.imwrite(path, RNG.integers(0, 255, (64, 64), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])


BROKEN_IMAGES = {
    "empty": ("a.png", lambda path: path.write_bytes(b""), "file is empty"),
    "text": ("a.png", lambda path: path.write_text("not an image"), "cannot be read"),
    "text tiff": ("a.tif", lambda path: path.write_text("not an image"), "cannot be read"),
    "truncated png": ("a.png", write_truncated_png, "cannot be read"),
    "truncated tiff": ("a.tif", write_truncated_tiff, "cannot be read"),
    "missing": ("a.png", lambda path: None, "cannot be read"),
    "pages": ("a.tif", lambda path: tifffile.imwrite(path, np.zeros((5, 8, 8), np.uint8)), "5 pages"),
    "nan": ("a.tif", write_nan, "NaN or infinite"),
    "channels": (
        "a.tif",
        lambda path: tifffile.imwrite(path, np.zeros((8, 8, 6), np.uint8), planarconfig="contig"),
        "6 channels",
    ),
    "unknown format": ("a.xyz", lambda path: path.write_text(""), "no reader for .xyz"),
    "large": ("a.png", lambda path: Image.new("1", (6000, 6000)).save(path), "decompression bomb"),
    "bomb": ("a.png", lambda path: Image.new("1", (14000, 14000)).save(path), "decompression bomb"),
    # A sparse file.
    "large tiff": ("a.tif", lambda path: tifffile.memmap(path, shape=(6000, 6000), dtype=np.uint8), "compression bomb"),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_a_broken_image_says_why_and_what_to_do(tmp_path: Path, case: str) -> None:
    name, write, reason = BROKEN_IMAGES[case]
    write(tmp_path / name)

    with pytest.raises(BrokenSampleError, match=reason) as broken:
        read_image(tmp_path / name)

    assert broken.value.cure


def test_masks_with_equal_channels_are_grey(tmp_path: Path) -> None:
    Image.fromarray(np.repeat(LABELS[..., None], 3, axis=2)).save(tmp_path / "a.png")

    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), LABELS)


def test_whole_numbers_in_a_float_mask_are_labels(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", LABELS.astype(np.float32))

    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), LABELS)


@pytest.mark.parametrize(
    ("name", "pixels", "reason"),
    [
        ("a.jpg", GREY, "JPEG mask"),
        ("a.png", COLOUR, "coloured mask"),
        ("a.tif", np.full((4, 4), 0.5, np.float32), "whole numbers"),
    ],
)
def test_a_mask_without_exact_labels_is_broken(tmp_path: Path, name: str, pixels: np.ndarray, reason: str) -> None:
    (tifffile.imwrite if name.endswith("tif") else lambda path, data: Image.fromarray(data).save(path))(
        tmp_path / name, pixels
    )

    with pytest.raises(BrokenSampleError, match=reason):
        read_mask(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "JPEG"), ("a.bmp", "MPO"), ("a.tif", "TIFF"), ("colour.tif", "TIFF")]
)
def test_jpeg_compression_of_a_mask_is_found_whatever_its_suffix_says(tmp_path: Path, name: str, kind: str) -> None:
    options = {"compression": "jpeg"} if kind == "TIFF" else {}
    Image.fromarray(COLOUR if name == "colour.tif" else GREY).save(tmp_path / name, kind, **options)

    with pytest.raises(BrokenSampleError, match="a JPEG mask: its compression alters labels") as broken:
        read_mask(tmp_path / name)

    assert "mask_threshold" in broken.value.cure
    assert read_mask_colours(tmp_path / name).shape[:2] == read_image(tmp_path / name).shape[:2] == GREY.shape


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".png", ".tif", ".bmp", ".jpg"]))
def test_damaged_bytes_never_raise_anything_but_a_broken_sample(
    tmp_path: Path, data: st.DataObject, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(COLOUR).save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])

    with contextlib.suppress(BrokenSampleError):
        assert read_image(path).ndim in (2, 3)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("a.PNG", ("a", ".png")), ("a.b.tif", ("a.b", ".tif")), ("plain", ("plain", "")), ("x.csv", ("x", ".csv"))],
)
def test_names_split_into_stem_and_suffix(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_a_registered_double_suffix_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READERS", {**readers.READERS, ".nii.gz": lambda path, labels: GREY})

    assert split_name("brain.nii.gz") == ("brain", ".nii.gz")


def test_an_animation_is_refused_and_a_still_gif_is_read(tmp_path: Path) -> None:
    still, moving = tmp_path / "still.gif", tmp_path / "moving.gif"
    Image.fromarray(GREY).save(still)
    Image.fromarray(GREY).save(moving, save_all=True, append_images=[Image.fromarray(GREY[::-1])])

    np.testing.assert_array_equal(read_image(still), np.repeat(GREY[..., None], 3, axis=2))
    with pytest.raises(BrokenSampleError, match="an animation of 2 frames"):
        read_image(moving)


# Each Orientation tag, and the image that stored pixels with it show.
TURNS = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
STORED = {
    "grey": Image.fromarray(GREY),
    "16 bit grey": Image.fromarray(DEEP),
    "1 bit": Image.fromarray(LABELS > 1),
    "rgb": Image.fromarray(COLOUR),
    "rgba": Image.merge("RGBA", [*Image.fromarray(COLOUR).split(), Image.fromarray(GREY)]),
    "palette": Image.fromarray(LABELS).convert("P"),
    "cmyk": Image.fromarray(COLOUR).convert("CMYK"),
    "lab": Image.fromarray(np.ascontiguousarray(COLOUR), "LAB"),
}
COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", STORED)
def test_a_tiff_is_turned_by_its_tag_whatever_its_pixels_and_compression(
    tmp_path: Path, kind: str, compression: str | None, orientation: int
) -> None:
    image, plain, turned = STORED[kind], tmp_path / "plain.tif", tmp_path / "turned.tif"
    image.save(plain)
    image.save(turned, compression=compression, tiffinfo={0x0112: orientation})

    np.testing.assert_array_equal(read_image(turned), TURNS[orientation](read_image(plain)))
    assert orientations_of([turned]) == [orientation]
    if kind in ("grey", "16 bit grey", "1 bit", "palette"):
        np.testing.assert_array_equal(read_mask(turned), TURNS[orientation](read_mask(plain)))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    "layout",
    [
        {"photometric": "rgb", "planarconfig": "separate"},
        {"photometric": "rgb", "planarconfig": "separate", "compression": "deflate", "tile": (16, 16)},
        {"photometric": "miniswhite"},
    ],
)
def test_planes_tiles_and_white_is_zero_are_turned_too(tmp_path: Path, layout: dict, orientation: int) -> None:
    path, planes = tmp_path / "a.tif", layout["photometric"] == "rgb"
    stored = np.ascontiguousarray(np.moveaxis(COLOUR, -1, 0)) if planes else 255 - GREY
    tifffile.imwrite(path, stored, extratags=[(274, 3, 1, orientation, False)], **layout)

    np.testing.assert_array_equal(read_image(path), TURNS[orientation](COLOUR if planes else GREY))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_the_orientation_in_a_tiffs_xmp_counts_without_a_tag(tmp_path: Path, compression: str | None) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.fromarray(GREY).save(tmp_path / "a.tif", compression=compression, tiffinfo={700: xmp})

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), TURNS[6](GREY))
    assert orientations_of([tmp_path / "a.tif"]) == [6]


@pytest.mark.parametrize("tag", [0, 9, 700])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path, compression: str | None, tag: int) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(GREY).save(path, compression=compression, tiffinfo={0x0112: 3})
    entry = struct.pack("<HHI", 0x0112, 3, 1)
    assert entry + b"\3" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(entry + b"\3\0", entry + struct.pack("<H", tag)))

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), GREY)
    assert orientations_of([tmp_path / "a.tif"]) == [1]


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("place", ["exif", "exif behind the pixels", "exif as text", "xmp"])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_is_turned_by_its_exif_or_xmp(tmp_path: Path, depth: int, place: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    kind, body = b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")
    if place == "xmp":
        text = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
        kind, body = b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text
    elif place == "exif as text":
        text = f"Raw profile type exif\0\nexif\n{len(exif.tobytes()):8}\n{exif.tobytes().hex()}\n"
        kind, body = b"tEXt", text.encode()
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    pixels = RNG.integers(0, 65_536, (9, 11, 3), dtype=np.uint16) if depth == 16 else COLOUR
    path = tmp_path / "a.png"
    if depth == 16:
        path.write_bytes(png(pixels))
    else:
        Image.fromarray(pixels).save(path)
    stored = path.read_bytes()
    cut = len(stored) - 12 if place == "exif behind the pixels" else 33
    path.write_bytes(stored[:cut] + chunk + stored[cut:])

    np.testing.assert_array_equal(read_image(path), TURNS[orientation](pixels))
    assert orientations_of([path]) == [orientation]


ALPHA = np.where(LABELS > 0, 255, 0).astype(np.uint8)


def save_alpha(path: Path, grey: np.ndarray, mode: str) -> None:
    """Save a mask of constant grey or colour, with ``ALPHA``, in one of the forms that editors export."""
    if mode == "16 bit":
        path.write_bytes(png(np.stack([grey, grey, grey, ALPHA], axis=-1).astype(np.uint16)))
    elif mode == "16 bit grey":
        path.write_bytes(png(np.stack([grey, ALPHA], axis=-1).astype(np.uint16)))
    elif mode == "palette":
        image = Image.fromarray(LABELS).convert("P")
        image.putpalette([9] * 9)
        image.save(path, transparency=bytes([0, 255, 255]))
    elif mode.startswith("planes"):
        planes = np.stack([grey, grey, grey, ALPHA])
        tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", extrasamples=("unassalpha",))
    else:
        colours = [Image.fromarray(grey)] * (len(mode) - 1)
        compression = {"compression": "tiff_lzw"} if path.stem == "lzw" else {}
        Image.merge(mode, [*colours, Image.fromarray(ALPHA)]).save(path, **compression)


@pytest.mark.parametrize("value", [0, 1, 255])
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGBA"),
        ("a.png", "LA"),
        ("a.png", "16 bit"),
        ("a.png", "16 bit grey"),
        ("a.tif", "RGBA"),
        ("a.tif", "LA"),
        ("lzw.tif", "RGBA"),
        ("lzw.tif", "LA"),
        ("a.tif", "planes"),
    ],
)
def test_a_mask_with_its_label_in_the_alpha_channel_is_refused(
    tmp_path: Path, name: str, mode: str, value: int
) -> None:
    save_alpha(tmp_path / name, np.full_like(GREY, value), mode)

    for read in (read_mask, read_mask_colours):
        with pytest.raises(BrokenSampleError, match="the label is in the alpha channel; save it as grey"):
            read(tmp_path / name)
    assert read_image(tmp_path / name).max() == value


def test_a_palette_of_one_colour_with_a_varying_alpha_is_no_colour_mask(tmp_path: Path) -> None:
    save_alpha(tmp_path / "a.png", GREY, "palette")

    with pytest.raises(BrokenSampleError, match="alpha channel"):
        read_mask_colours(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), LABELS)


@pytest.mark.parametrize("alpha", [ALPHA, np.full_like(ALPHA, 255)])
def test_a_mask_of_several_colours_may_have_an_alpha_channel(tmp_path: Path, alpha: np.ndarray) -> None:
    layers = [Image.fromarray(LABELS)] * 3
    Image.merge("RGBA", [*layers, Image.fromarray(alpha)]).save(tmp_path / "a.png")

    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), LABELS)


def test_an_empty_mask_of_one_alpha_is_read(tmp_path: Path) -> None:
    Image.new("RGBA", (5, 4), (0, 0, 0, 255)).save(tmp_path / "a.png")

    assert not read_mask(tmp_path / "a.png").any()


@pytest.mark.parametrize("kind", ["CMYK", "LAB"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_other_colour_spaces_become_rgb_whatever_the_compression(
    tmp_path: Path, kind: str, compression: str | None
) -> None:
    bands = {"CMYK": 4, "LAB": 3}[kind]
    image = Image.merge(kind, [Image.fromarray(np.roll(GREY, band, axis=0)) for band in range(bands)])
    image.save(tmp_path / "a.tif", compression=compression)

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.array(image.convert("RGB")))


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_compressed_ycbcr_tiffs_become_rgb(tmp_path: Path, compression: str) -> None:
    image = Image.fromarray(np.full((16, 16, 3), (200, 30, 90), np.uint8)).convert("YCbCr")
    image.save(tmp_path / "a.tif", compression=compression)

    np.testing.assert_allclose(read_image(tmp_path / "a.tif"), np.array(image.convert("RGB")), atol=2)


UNNAMED = {
    "YCBCR": {"photometric": "ycbcr"},
    "CIELAB": {"photometric": "cielab", "planarconfig": "separate"},
    "ICCLAB": {"photometric": "icclab"},
    "ITULAB": {"photometric": "itulab"},
    "LINEAR_RAW": {"photometric": "linear_raw"},
    "CFA": {"photometric": "cfa"},
    "MASK": {"photometric": "mask"},
}


@pytest.mark.parametrize("space", UNNAMED)
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_colour_space_that_is_not_read_is_named(
    tmp_path: Path, space: str, depth: type, compression: str | None
) -> None:
    bands = {"CFA": 1, "MASK": 1}.get(space, 3)
    pixels = np.zeros((16, 16, bands), depth) if bands > 1 else np.zeros((16, 16), depth)
    if UNNAMED[space].get("planarconfig") == "separate":
        pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    tifffile.imwrite(tmp_path / "a.tif", pixels, compression=compression, **UNNAMED[space])

    for read in (read_image, read_mask, read_mask_colours):
        if space == "YCBCR" and compression:
            continue
        with pytest.raises(BrokenSampleError, match=f"colour space {space}") as broken:
            read(tmp_path / "a.tif")
        assert "save it as grey or RGB" in broken.value.cure


def test_cmyk_of_sixteen_bit_is_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((16, 16, 4), np.uint16), photometric="separated")

    with pytest.raises(BrokenSampleError, match="colour space SEPARATED, 4 samples of 16 bit"):
        read_image(tmp_path / "a.tif")


def test_complex_pixels_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8), np.complex64))

    with pytest.raises(BrokenSampleError, match="pixels of type complex64"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_palette_tiff_with_an_alpha_channel_keeps_its_indices(tmp_path: Path, compression: str | None) -> None:
    image = Image.fromarray(LABELS).convert("P")
    image.putpalette([0, 0, 0, 200, 10, 20, 30, 250, 40])
    image = image.convert("PA")
    image.putalpha(Image.fromarray(GREY))
    image.save(tmp_path / "a.tif", compression=compression)

    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), LABELS)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[LABELS == 1][0], [200, 10, 20])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_colours_that_are_multiplied_by_alpha_are_read_alike_whatever_the_compression(
    tmp_path: Path, mode: str, compression: str | None
) -> None:
    alpha = np.where(LABELS > 0, GREY, 0).astype(np.uint8)
    layers = COLOUR if mode == "RGBA" else GREY[..., None]
    stored = np.concatenate([layers.astype(np.uint16) * alpha[..., None] // 255, alpha[..., None]], axis=-1)
    image = Image.merge(
        mode, [Image.fromarray(np.ascontiguousarray(layer)) for layer in np.moveaxis(stored.astype(np.uint8), -1, 0)]
    )
    path = tmp_path / "a.tif"
    image.save(path, compression=compression)
    # Pillow writes 2, not multiplied, into the tag ExtraSamples.
    entry = struct.pack("<HHI", 338, 3, 1)
    assert entry + b"\2" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(entry + b"\2", entry + b"\1"))

    found = read_image(path).reshape(*GREY.shape, -1)
    visible = alpha > 100
    np.testing.assert_allclose(found[visible].astype(int), layers[visible].astype(int), atol=4)


@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_label_in_a_channel_that_a_tiff_does_not_name_is_refused(
    tmp_path: Path, compression: str | None, mode: str, value: int
) -> None:
    path, colours = tmp_path / "a.tif", [Image.new("L", ALPHA.shape[::-1], value)] * (len(mode) - 1)
    Image.merge(mode, [*colours, Image.fromarray(ALPHA)]).save(path, compression=compression)
    entry = struct.pack("<HHI", 338, 3, 1)
    assert entry + b"\2" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(entry + b"\2", entry + b"\0"))

    for read in (read_mask, read_mask_colours):
        with pytest.raises(BrokenSampleError, match="the label is in the alpha channel"):
            read(path)
    np.testing.assert_array_equal(read_image(path), np.full(read_image(path).shape, value))


@pytest.mark.parametrize("compression", [None, "deflate", "lzma"])
@pytest.mark.parametrize("pixels", [GREY, DEEP], ids=["8 bit", "16 bit"])
def test_white_is_zero_is_inverted_whatever_the_compression(
    tmp_path: Path, pixels: np.ndarray, compression: str | None
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", ~pixels, photometric="miniswhite", compression=compression)

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), pixels)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize("compression", [None, "deflate", "lzma"])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_white_is_zero_without_a_white_is_refused(tmp_path: Path, kind: type, compression: str | None) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY.astype(kind), photometric="miniswhite", compression=compression)

    with pytest.raises(BrokenSampleError, match="colour space MINISWHITE"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("planes", [3, 4])
def test_grey_planes_are_never_read_as_their_first(tmp_path: Path, planes: int) -> None:
    pixels = np.stack([GREY] * planes)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="separate", compression="lzma")

    with pytest.raises(BrokenSampleError, match=f"colour space MINISBLACK, {planes} samples"):
        read_image(tmp_path / "a.tif")
