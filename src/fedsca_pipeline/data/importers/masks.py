"""Published mask files to classes. Each public function returns a ``Label``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.preprocessing.labels import listed, look_up, packed
from fedsca_pipeline.data.readers.common import LOSSY, BrokenSampleError, split_name
from fedsca_pipeline.data.readers.images import read_mask, read_mask_colours
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.readers.volumes import read_volume_mask
from fedsca_pipeline.data.site_folder.label_rule import colour_of, number_of

Image = np.ndarray | Volume
"""[H, W] or [H, W, 3], or a volume."""

Label = Callable[[tuple[Path, ...], Image], np.ndarray]
"""Mask files and their image to uint8 classes of its shape, without channels; 0 is background. No file: zeros."""

Outlines = Callable[[Path], Iterable[tuple[str, np.ndarray]]]
"""A file to its outlines: names and corners, float [N, 2] of x and y in pixels."""


def from_files(read: Callable[[Path, Image], np.ndarray]) -> Label:
    """Return a label that joins what ``read`` returns for each file and the image, uint8 classes.

    Where files overlap, the higher class is on top (a cup in its disc).
    """

    def label(paths: tuple[Path, ...], image: Image) -> np.ndarray:
        mask = _nothing(image)
        for path in paths:
            mask = np.maximum(mask, at_shape(read(path, image), mask.shape))
        return mask

    return label


def two_values() -> Label:
    """Return a label whose foreground is at least half the type's largest value, in the mean of the channels.

    It suits masks blurred by JPEG compression, and masks of 0 and 1 in one file and 0 and 255 in the next: if no value
    is above 1, everything above 0 is foreground. A mask of low values only, 2 and more, numbers classes or objects, and
    is refused. Several files are joined. A volume's mask has one value beside 0.
    """
    return from_files(lambda path, image: _one_value(path, image) if _solid(image) else _black_or_white(path))


def coloured() -> Label:
    """Return a label for kinds in colours on black: foreground is any channel of at least half the largest value."""
    return from_files(lambda path, _: _upper_half(_brightest(read_mask_colours(path))))


def objects() -> Label:
    """Return a label for masks that number their objects: all but 0 is foreground. Several files are joined."""
    return from_files(lambda path, image: (_numbers(path, image) > 0).astype(np.uint8))


def seen_values(classes: Mapping[int, int]) -> Label:
    """Return a label by grey value, with palettes resolved and equal colour channels as one; keys of ``classes``."""

    def read(path: Path, image: Image) -> np.ndarray:
        return to_classes(_numbers(path, image) if _solid(image) else _one_channel(read_mask_colours(path)), classes)

    return from_files(read)


def stored_values(classes: Mapping[int, int]) -> Label:
    """Return a label by stored number, or palette index; keys of ``classes``."""
    return from_files(lambda path, image: to_classes(_numbers(path, image), classes))


def colours(classes: Mapping[str, int]) -> Label:
    """Return a label by colour ``#rrggbb`` of 8 bit channels; keys of ``classes``, and unnamed black is background."""
    named = {0: 0, **{number_of(colour): number for colour, number in classes.items()}}
    return from_files(lambda path, _: to_classes(packed(read_mask_colours(path)), named, write=colour_of))


def file_a_class(endings: Mapping[str, int]) -> Label:
    """Return a label for one file per class, by the end of its name; foreground is the upper half of the range.

    Every class needs its file, if only an empty one.
    """

    half = from_files(lambda path, _: _upper_half(_grey(read_mask_colours(path))))

    def label(paths: tuple[Path, ...], image: Image) -> np.ndarray:
        mask = _nothing(image)
        for ending, number in endings.items():
            own = [path for path in paths if path.name.endswith(ending)]
            if not own:
                raise BrokenSampleError(f"its mask *{ending} is missing", "add it, or delete the image")
            mask = np.maximum(mask, half(tuple(own), image) * np.uint8(number))
        return mask

    return label


def polygons(outlines: Outlines, classes: Mapping[str, int]) -> Label:
    """Return a label of filled outlines; their names, in any case, are keys of ``classes``. Class 0 is not drawn.

    Where outlines overlap, the higher class is on top.
    """

    def label(paths: tuple[Path, ...], image: Image) -> np.ndarray:
        from skimage.draw import polygon

        mask = _nothing(image)
        for path in paths:
            for name, corners in outlines(path):
                number = classes.get(name.strip().lower())
                if number is None:
                    raise BrokenSampleError(
                        f"an outline has a name that this layout lacks; it has {', '.join(classes)}",
                        "check that the file is of this data set",
                        quoted=repr(name),
                    )
                if not np.isfinite(corners).all():
                    raise BrokenSampleError("an outline with corners that are no numbers", "fix the file", quoted=name)
                if number:
                    inside = polygon(corners[:, 1], corners[:, 0], mask.shape)
                    mask[inside] = np.maximum(mask[inside], number)
        return mask

    return label


def to_classes(values: np.ndarray, classes: Mapping[int, int], write: Callable[[int], str] = str) -> np.ndarray:
    """Return uint8 classes for whole numbers, all of which must be keys of ``classes``.

    Raises:
        BrokenSampleError: some are not; ``write`` formats them in the message.
    """
    mask, unknown = look_up(values, classes)
    if unknown:
        raise BrokenSampleError(
            f"mask values {listed(unknown, write)} are unknown to this layout, which has "
            f"{', '.join(map(write, sorted(classes)))}",
            "check that the file is a mask of this data set",
        )
    return mask


def _solid(image: Image) -> bool:
    return isinstance(image, Volume)


def _nothing(image: Image) -> np.ndarray:
    return np.zeros(image.shape if isinstance(image, Volume) else image.shape[:2], np.uint8)


def _numbers(path: Path, image: Image) -> np.ndarray:
    return read_volume_mask(path, image) if isinstance(image, Volume) else read_mask(path)


def _one_value(path: Path, image: Image) -> np.ndarray:
    numbers = _numbers(path, image)
    if len(values := np.unique(numbers[numbers != 0])) > 1:
        raise BrokenSampleError(
            f"mask values {', '.join(map(str, values[:5]))} where one beside 0 was expected",
            "name their classes by values in a layout file",
        )
    classes: np.ndarray = (numbers != 0).astype(np.uint8)
    return classes


def _black_or_white(path: Path) -> np.ndarray:
    grey = _grey(read_mask_colours(path))
    mask = _upper_half(grey)
    # Compression makes a black mask slightly grey.
    if not mask.any() and grey.any() and split_name(path.name)[1] not in LOSSY:
        values = np.unique(grey[grey > 0])
        raise BrokenSampleError(
            f"mask values {listed(values.tolist(), str)}, the largest below half of what its type can hold: numbers of "
            "classes or objects",
            "name their meaning by values or objects in a layout file",
        )
    return mask


def at_shape(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask that has its image's shape.

    Raises:
        BrokenSampleError: it has another one.
    """
    if mask.shape != shape:
        raise BrokenSampleError(
            f"the mask is {_times(mask.shape)}, its image {_times(shape)}", "export both at one size and orientation"
        )
    return mask


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _upper_half(grey: np.ndarray) -> np.ndarray:
    full = np.iinfo(grey.dtype).max if np.issubdtype(grey.dtype, np.integer) else 1.0
    return (grey > 0 if grey.max() <= 1 else grey >= 0.5 * full).astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 2 else np.rint(pixels.mean(axis=2)).astype(pixels.dtype)


def _brightest(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 2 else pixels.max(axis=2)


def _one_channel(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels
    if (pixels != pixels[..., :1]).any():
        raise BrokenSampleError("a coloured mask where grey values were expected", "name its colours in a layout file")
    return pixels[..., 0]
