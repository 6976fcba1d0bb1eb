"""From mask files as published to classes. Each function makes what ``Importer.label`` wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from fedsca_pipeline.sites.labels import colour_of, look_up, packed
from fedsca_pipeline.sites.readers import BrokenSampleError, read_image, read_mask

Label = Callable[[tuple[Path, ...], tuple[int, int]], np.ndarray]
"""Mask files and the image's height and width to uint8 [H, W], 0 background. No file at all gives zeros."""


def two_values() -> Label:
    """Foreground is what is at least half the type's largest value, in the mean of the channels.

    For masks that JPEG compression has blurred, and those whose values are 0 and 1 in one file and 0 and 255 in the
    next: where no value is above 1, all above 0 is foreground. Several files are joined.
    """

    def label(paths: tuple[Path, ...], size: tuple[int, int]) -> np.ndarray:
        mask = np.zeros(size, np.uint8)
        for path in paths:
            grey = _grey(_at_size(read_image(path), size))
            full = np.iinfo(grey.dtype).max if np.issubdtype(grey.dtype, np.integer) else 1.0
            mask |= (grey > 0 if grey.max() <= 1 else grey >= 0.5 * full).astype(np.uint8)
        return mask

    return label


def objects() -> Label:
    """Foreground is all but 0, background: masks that number their objects. Several files are joined."""

    def label(paths: tuple[Path, ...], size: tuple[int, int]) -> np.ndarray:
        return _joined(paths, size, lambda path: (read_mask(path) > 0).astype(np.uint8))

    return label


def seen_values(classes: Mapping[int, int]) -> Label:
    """The grey value as seen, a palette resolved and equal colour channels taken as one, is a key of ``classes``."""

    def label(paths: tuple[Path, ...], size: tuple[int, int]) -> np.ndarray:
        return _joined(paths, size, lambda path: _mapped(_one_channel(read_image(path)), classes))

    return label


def stored_values(classes: Mapping[int, int]) -> Label:
    """The number as stored, an index where there is a palette, is a key of ``classes``."""

    def label(paths: tuple[Path, ...], size: tuple[int, int]) -> np.ndarray:
        return _joined(paths, size, lambda path: _mapped(read_mask(path), classes))

    return label


def colours(classes: Mapping[tuple[int, int, int], int]) -> Label:
    """The colour, of 8 bit channels, is a key of ``classes``; black is background if it is not named."""
    named = {0: 0, **{int(packed(np.array(colour, np.uint8))): number for colour, number in classes.items()}}

    def read(path: Path) -> np.ndarray:
        return _mapped(packed(read_image(path)), named, write=colour_of)

    def label(paths: tuple[Path, ...], size: tuple[int, int]) -> np.ndarray:
        return _joined(paths, size, read)

    return label


def _joined(paths: tuple[Path, ...], size: tuple[int, int], read: Callable[[Path], np.ndarray]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    for path in paths:
        # Where objects overlap, the higher class is the one inside (a cup in its disc).
        mask = np.maximum(mask, _at_size(read(path), size))
    return mask


def _at_size(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if pixels.shape[:2] != size:
        raise BrokenSampleError(
            f"the mask is {pixels.shape[0]} x {pixels.shape[1]}, its image {size[0]} x {size[1]}",
            "export both at one size and orientation",
        )
    return pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 2 else np.rint(pixels.mean(axis=2)).astype(pixels.dtype)


def _one_channel(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels
    if (pixels != pixels[..., :1]).any():
        raise BrokenSampleError("a coloured mask where grey values were expected", "name its colours in a layout file")
    return pixels[..., 0]


def _mapped(
    values: np.ndarray, classes: Mapping[int, int], write: Callable[[int], str] = lambda value: str(value)
) -> np.ndarray:
    mask, unknown = look_up(values, classes)
    if unknown:
        raise BrokenSampleError(
            f"mask values {', '.join(map(write, unknown[:5]))}{' and more' if len(unknown) > 5 else ''} mean nothing "
            f"in this layout, which has {', '.join(map(write, sorted(classes)))}",
            "look whether the file is a mask of this data set",
        )
    return mask
