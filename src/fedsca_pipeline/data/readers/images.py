"""Image and mask files to arrays. A further format is one more entry of ``READERS``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from fedsca_pipeline.data.readers.common import (
    COPY_AGAIN,
    MAX_PIXELS,
    UNREADABLE,
    BrokenSampleError,
    check_not_empty,
    finite_values,
    lossy_mask,
    no_reader,
    refuse_lossy_mask,
    split_name,
    unreadable,
    whole_numbers,
)
from fedsca_pipeline.data.readers.decoding import in_child

if TYPE_CHECKING:
    from tifffile import TiffPage

_MAX_BYTES = 6 * MAX_PIXELS


def read_image(path: Path) -> np.ndarray:
    """Read an image as [H, W] (grey) or [H, W, 3] (RGB), in the file's own number type.

    Alpha is dropped, palettes become colours, and the Orientation tag (EXIF, XMP or TIFF) is applied: the mask of a
    photograph has to be drawn on the upright image.

    Raises:
        BrokenSampleError: unreadable, of no known format, without pixels, or with NaN or infinite values.
    """
    return _image(_read(path, labels=False))


def _image(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 3:
        pixels = _drop_alpha(pixels)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    return finite_values(pixels)


def read_mask_colours(path: Path) -> np.ndarray:
    """Read a mask whose colours or grey values mean something, as ``read_image`` reads an image.

    Raises:
        BrokenSampleError: as of ``read_image``, or the label is in the alpha channel.
    """
    pixels = _read(path, labels=False)
    _refuse_label_in_alpha(pixels)
    return _image(pixels)


def read_mask(path: Path) -> np.ndarray:
    """Read a mask as integers [H, W]: grey values or palette indices, as stored, before any label map.

    The Orientation tag is applied, as to an image.

    Raises:
        BrokenSampleError: unreadable, of a compression that alters labels (JPEG, whatever the suffix), coloured, not of
            whole numbers, or with its label in the alpha channel.
    """
    refuse_lossy_mask(path)
    pixels = _read(path, labels=True)
    _refuse_label_in_alpha(pixels)
    if pixels.ndim == 3:
        pixels = _drop_alpha(pixels)
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise BrokenSampleError(
                "a coloured mask: labels must be one number a pixel",
                "name its colours under label_map in the site's site.yml ('#ff0000': 1), or save it as grey or palette "
                "image, 0 = background",
            )
        pixels = pixels[..., 0]
    return whole_numbers(pixels)


def orientations_of(paths: Sequence[Path]) -> list[int]:
    """Return the Orientation tags of readable images or masks, 1 to 8; 1, upright, without a tag."""
    # Most files have no tag; to ask the child for it costs more than to look for the name of one.
    return decode_orientations(paths).tolist() if any(map(_may_be_turned, paths)) else [1] * len(paths)


def _may_be_turned(path: Path) -> bool:
    content = path.read_bytes()
    marks = next((marks for start, marks in _TAG_MARKS.items() if content.startswith(start)), (b"",))
    return any(mark in content for mark in marks)


@in_child
def decode_orientations(paths: Sequence[Path]) -> np.ndarray:
    """Return ``orientations_of`` as uint8 [N]."""
    return np.array([_orientation_of(path) for path in paths], np.uint8)


def _orientation_of(path: Path) -> int:
    if READERS[split_name(path.name)[1]] is _read_tiff:
        import tifffile

        with tifffile.TiffFile(path) as file:
            return _tiff_orientation(file.pages.first)
    with Image.open(path) as image:
        return _valid(image.getexif().get(ExifTags.Base.Orientation))


def _read(path: Path, *, labels: bool) -> np.ndarray:
    suffix = split_name(path.name)[1]
    if suffix not in READERS:
        raise no_reader(suffix, READERS)
    return decode_pixels(path, labels)


@in_child
def decode_pixels(path: Path, labels: bool) -> np.ndarray:
    """Return a file's [H, W] or [H, W, C], in its own number type; ``labels`` asks for stored numbers.

    Raises:
        BrokenSampleError: unreadable, too large, several images, or without plain numbers.
    """
    try:
        check_not_empty(path)
        pixels = READERS[split_name(path.name)[1]](path, labels)
    except Image.DecompressionBombError as error:
        raise _bomb() from error
    except UNREADABLE as error:
        raise unreadable(error) from error
    if 0 in pixels.shape:
        raise BrokenSampleError("has no pixels", COPY_AGAIN)
    if pixels.dtype.kind not in "buif":
        raise BrokenSampleError(f"holds pixels of type {pixels.dtype}", "save one plain number a channel")
    return pixels


def _read_pillow(path: Path, labels: bool) -> np.ndarray:
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise _bomb()
        # An MPO is a photograph with previews.
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            raise BrokenSampleError(
                f"an animation of {frames} frames", "save each frame as an image, with its own mask"
            )
        if image.mode in ("RGB", "RGBA") and len(image.tile) == 1 and "16B" in str(image.tile[0].args):
            return _read_png_16bit_colour(path)
        # Whatever its suffix says.
        if labels and image.format in ("JPEG", "MPO"):
            raise lossy_mask("JPEG")
        if image.format == "TIFF":
            # Without a name it is not mapped into memory, where Pillow exchanges the sides of a turned CMYK image.
            image.filename = ""
            _keep_unnamed_channel(image)
        # Pillow stretches 2 and 4 bit grey to 0..255; labels need the stored number.
        stretched = {"L;2": 85, "L;4": 17}.get(str(image.tile[0].args), 1) if labels and image.tile else 1
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(_plain(image, labels))
        return pixels // np.uint8(stretched) if stretched > 1 else pixels


def _keep_unnamed_channel(image: ImageFile.ImageFile) -> None:
    """Let a compressed TIFF's last channel, if its header does not name it, be read as alpha; Pillow would drop it."""
    tile = image.tile[0]
    if isinstance(tile.args, tuple) and tile.codec_name == "libtiff" and tile.args[0] in _UNNAMED_CHANNELS:
        named = _UNNAMED_CHANNELS[tile.args[0]]
        image.tile = [tile._replace(args=(named, *tile.args[1:]))]
        image._mode = named


def _plain(image: Image.Image, labels: bool) -> Image.Image:
    if image.mode in _ARRAY_MODES or (labels and image.mode in ("P", "PA")):
        return image
    if image.mode == "La":
        return image.convert("LA")
    return image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")


def _read_png_16bit_colour(path: Path) -> np.ndarray:
    """Read a 16 bit colour PNG exactly; Pillow alone would keep its upper eight bits.

    Each pass decodes one byte of every sample: ``RGB;16B`` the upper one, ``RGB;16L`` the lower. Grey with alpha has
    four bytes per pixel, as RGBA has.
    """

    def decode(rawmode: Callable[[str], str]) -> np.ndarray:
        with Image.open(path) as image:
            tile = image.tile[0]
            image.tile = [tile._replace(args=rawmode(str(tile.args)))]
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(image).astype(np.uint16)

    with Image.open(path) as image:
        grey = image.tile[0].args == "LA;16B"
    if grey:
        values = decode(lambda _: "RGBA")
        pixels: np.ndarray = values[..., ::2] << 8 | values[..., 1::2]
    else:
        pixels = decode(lambda mode: mode) << 8 | decode(lambda mode: mode.replace("16B", "16L"))
    return pixels


def _read_tiff(path: Path, labels: bool) -> np.ndarray:
    """Read a TIFF of one page, upright; white-is-zero files are inverted as viewers do."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        if len(file.pages) != 1:
            raise BrokenSampleError(
                f"a TIFF of {len(file.pages)} pages", "save each page as an image, with its own mask"
            )
        page = file.pages.first
        if page.imagewidth * page.imagelength > MAX_PIXELS or page.nbytes > _MAX_BYTES:
            raise _bomb()
        if page.axes not in ("YX", "YXS", "SYX"):
            raise BrokenSampleError(f"a TIFF with axes {page.axes}", "save a two-dimensional grey or RGB image")
        if labels and any(name in _codec(page) for name in _LOSSY_CODECS):
            raise lossy_mask(_codec(page))
        plain = page.photometric in _PLAIN_SPACES
        if not (plain or _pillow_converts(page)) or (page.photometric == _WHITE_IS_ZERO and page.sampleformat != 1):
            raise _unnamed(page)
        own = plain and page.compression in _TIFF_OWN
        return _plain_pixels(page, labels) if own else _by_pillow(path, page, labels)


def _by_pillow(path: Path, page: TiffPage, labels: bool) -> np.ndarray:
    """Return the pixels of a page that Pillow decodes, or converts to RGB."""
    if page.samplesperpixel > 1 and page.bitspersample > 8:
        raise BrokenSampleError(
            f"a {page.bitspersample} bit colour TIFF compressed with {_codec(page)}",
            "save it uncompressed or with deflate",
        )
    # Of grey planes Pillow would read the first.
    if page.photometric in _ONE_CHANNEL and page.samplesperpixel > 2:
        raise _unnamed(page)
    try:
        pixels = _read_pillow(path, labels)
    except UnidentifiedImageError as error:
        raise _unnamed(page) from error
    # Pillow inverts 8 bit and less.
    return ~pixels if page.photometric == _WHITE_IS_ZERO and pixels.dtype == np.uint16 else pixels


def _plain_pixels(page: TiffPage, labels: bool) -> np.ndarray:
    """Return the pixels of a grey, RGB or palette page that tifffile decodes."""
    from tifffile import EXTRASAMPLE, PHOTOMETRIC

    pixels = page.asarray()
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    pixels = _upright(pixels, _tiff_orientation(page))
    if tuple(page.extrasamples) == (EXTRASAMPLE.ASSOCALPHA,) and pixels.dtype.kind == "u" and pixels.ndim == 3:
        pixels = _without_alpha_in_colours(pixels)
    if page.photometric == _WHITE_IS_ZERO:
        return ~pixels if pixels.dtype == bool else (2**page.bitspersample - 1) - pixels
    if page.photometric == PHOTOMETRIC.PALETTE and not labels:
        colours: np.ndarray = np.asarray(page.colormap)
        # A second sample is alpha.
        indices = pixels if pixels.ndim == 2 else pixels[..., 0]
        return np.moveaxis((colours >> 8).astype(np.uint8)[:, indices], 0, -1)
    return pixels


def _without_alpha_in_colours(pixels: np.ndarray) -> np.ndarray:
    """Return the colours of pixels [H, W, C] that are multiplied by their alpha, the last channel, as Pillow does."""
    full, alpha = np.iinfo(pixels.dtype).max, pixels[..., -1:].astype(np.uint64)
    colours = full * pixels[..., :-1].astype(np.uint64) // np.maximum(alpha, 1)
    shown = np.where(alpha > 0, np.minimum(colours, full), pixels[..., :-1]).astype(pixels.dtype)
    return np.concatenate([shown, pixels[..., -1:]], axis=-1)


def _pillow_converts(page: TiffPage) -> bool:
    """Return whether Pillow converts a page of another colour space to RGB, and alike whatever the compression."""
    space = _space(page)
    if space == "YCBCR":
        # Not compressed, its blocks of subsampled colours are misread.
        return page.compression != 1
    inks = page.samplesperpixel - len(page.extrasamples)
    # Pillow mixes up the planes of CIELAB.
    return page.bitspersample == 8 and (space, inks, page.planarconfig) in (
        ("SEPARATED", 4, 1),
        ("SEPARATED", 4, 2),
        ("CIELAB", 3, 1),
    )


def _space(page: TiffPage) -> str:
    """Return the name of a page's colour space; its number if tifffile knows none."""
    return str(getattr(page.photometric, "name", page.photometric))


def _codec(page: TiffPage) -> str:
    """Return the name of a page's compression; its number if tifffile knows none."""
    return str(getattr(page.compression, "name", page.compression))


def _unnamed(page: TiffPage) -> BrokenSampleError:
    return BrokenSampleError(
        f"a TIFF that is not read: colour space {_space(page)}, {page.samplesperpixel} samples of {page.bitspersample} "
        f"bit, compression {_codec(page)}",
        "save it as grey or RGB of 8 bit, uncompressed or with deflate",
    )


def _tiff_orientation(page: TiffPage) -> int:
    """Return the Orientation tag of a page, else that of its XMP, as Pillow does."""
    if (tag := page.tags.valueof("Orientation")) is not None:
        return _valid(tag)
    xmp = page.tags.valueof("XMP")
    found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None
    return _valid(found and int(found[1]))


def _valid(orientation: object) -> int:
    return next((tag for tag in range(1, 9) if tag == orientation), 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return [H, W] or [H, W, C] with its first row at the top and its first column at the left."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = (slice(None, None, -1 if orientation in turned else 1) for turned in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(pixels[rows, columns])


def _refuse_label_in_alpha(pixels: np.ndarray) -> None:
    colours, alpha = pixels[..., :-1], pixels[..., -1]
    has_alpha = pixels.ndim == 3 and pixels.shape[2] in (2, 4)
    if has_alpha and (colours == colours[0, 0]).all() and (alpha != alpha[0, 0]).any():
        raise BrokenSampleError("the label is in the alpha channel", "save it as grey")


def _drop_alpha(pixels: np.ndarray) -> np.ndarray:
    channels = pixels.shape[2]
    if channels > 4:
        raise BrokenSampleError(f"has {channels} channels", "save a grey or RGB image")
    return pixels[..., 0] if channels < 3 else pixels[..., :3]


def _bomb() -> BrokenSampleError:
    return BrokenSampleError(
        f"has more than {MAX_PIXELS:,} pixels, or {_MAX_BYTES:,} bytes of them, as a decompression bomb has",
        "cut the image into tiles",
    )


_ARRAY_MODES = ("1", "L", "RGB", "RGBA", "LA", "I", "F", "I;16", "I;16L", "I;16B")
_UNNAMED_CHANNELS: Mapping[object, str] = MappingProxyType({"RGBX": "RGBA", "LX": "LA", "PX": "PA"})
# How a PNG and a JPEG begin, and what precedes their tags, in EXIF or XMP.
_TAG_MARKS: Mapping[bytes, tuple[bytes, ...]] = MappingProxyType(
    {
        b"\x89PNG": (b"eXIf", b"Raw profile type exif", b"com.adobe.xmp"),
        b"\xff\xd8": (b"Exif", b"ns.adobe.com/xap"),
    }
)
# Values of PhotometricInterpretation: white is zero, black is zero, RGB, palette.
_PLAIN_SPACES = (0, 1, 2, 3)
_WHITE_IS_ZERO, _ONE_CHANNEL = 0, (0, 1, 3)
# In tifffile's names of TIFF compressions that alter values, or may.
_LOSSY_CODECS = ("JPEG", "JP2", "WEBP")
# TIFF compressions that tifffile decodes by itself (none, deflate twice, PackBits); Pillow reads the others.
_TIFF_OWN = (1, 8, 32946, 32773)

READERS: Mapping[str, Callable[[Path, bool], np.ndarray]] = MappingProxyType(
    {
        ".png": _read_pillow,
        ".jpg": _read_pillow,
        ".jpeg": _read_pillow,
        ".bmp": _read_pillow,
        ".gif": _read_pillow,
        ".ppm": _read_pillow,
        ".pgm": _read_pillow,
        ".tif": _read_tiff,
        ".tiff": _read_tiff,
    }
)
"""Suffix to a function of (path, labels) that gives [H, W] or [H, W, C]; ``labels`` asks for stored numbers."""
