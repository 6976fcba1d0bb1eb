"""Mask pixels to classes: by number, by colour, or by a threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.preprocessing.geometry import ByteCounts
from fedsca_pipeline.data.readers.common import BrokenSampleError, refuse_lossy_mask
from fedsca_pipeline.data.readers.images import read_mask, read_mask_colours
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.readers.volumes import read_volume_mask
from fedsca_pipeline.data.site_folder.label_rule import LabelRule, colour_of, number_of

_SHOWN = 8


@dataclass(frozen=True)
class Tally:
    """The distinct integers of an array, ascending, and how often each occurs."""

    values: np.ndarray
    often: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Tally:
        """Return the tally of integers of any shape; there is at least one."""
        ends = np.array(sorted({values.min(), values.max()}))
        often = occurrences(values, ends)
        # Most masks show one class; np.unique takes several times as long.
        if often.sum() == values.size:
            return cls(ends, often)
        if values.dtype != np.uint8:
            return cls(*np.unique(values, return_counts=True))
        # A table of 256 is much faster than sorting.
        counts = ByteCounts.of([values.reshape(len(values), -1)])
        return cls(counts.values, counts.counts[counts.values])

    def most_frequent_first(self) -> list[int]:
        """Return the values by falling frequency; of equally frequent ones the smaller first."""
        values: list[int] = self.values[np.argsort(-self.often, kind="stable")].tolist()
        return values


def read_classes(path: Path, rule: LabelRule, classes: int) -> tuple[np.ndarray, dict[str, int]]:
    """Read a mask file as classes.

    Returns:
        uint8 [H, W] of 0 = background, 1..``classes``; and the applied map: value, colour or threshold to class.

    Raises:
        BrokenSampleError: the file cannot be read as a mask, or a value or colour in it has no class in 0..``classes``.
    """
    if rule.threshold is not None:
        return by_threshold(read_mask_colours(path), rule.threshold)
    if rule.colours:
        refuse_lossy_mask(path)
        pixels = read_mask_colours(path)
        if pixels.ndim == 3 or not rule.numbers:
            return by_colour(pixels, rule.colours, classes)
    return by_number(read_mask(path), rule.numbers, classes)


def read_volume_classes(path: Path, image: Volume, rule: LabelRule, classes: int) -> tuple[np.ndarray, dict[str, int]]:
    """Read the mask of a volume as classes uint8 [X, Y, Z]; see ``read_classes``.

    Raises:
        BrokenSampleError: as ``volumes.read_volume_mask``, or a value has no class in 0..``classes``.
    """
    values = read_volume_mask(path, image, whole=rule.threshold is None)
    if rule.threshold is None:
        return by_number(values, rule.numbers, classes)
    mask, applied = by_threshold(values.reshape(len(values), -1), rule.threshold)
    return mask.reshape(values.shape), applied


def by_number(values: np.ndarray, numbers: Mapping[int, int], classes: int) -> tuple[np.ndarray, dict[str, int]]:
    """Return integers of any shape as classes; see ``LabelRule.numbers`` and ``read_classes``."""
    applied, tally = dict(numbers), Tally.of(values)
    if not applied and {255} <= set(tally.values.tolist()) <= {0, 255}:
        applied = {255: 1}
    meant = {**{number: number for number in range(classes + 1)}, **applied}
    mask, unknown = look_up(values, {value: number for value, number in meant.items() if number <= classes}, tally)
    if unknown:
        raise BrokenSampleError(
            f"unknown label value {listed(unknown, str)} (classes are 0..{classes})",
            "name it under label_map in the site's site.yml, or raise preprocessing.classes",
        )
    return mask, {str(value): number for value, number in applied.items()}


def by_colour(pixels: np.ndarray, colours: Mapping[str, int], classes: int) -> tuple[np.ndarray, dict[str, int]]:
    """Return uint8 [H, W, 3], or grey [H, W], as classes; see ``LabelRule.colours`` and ``read_classes``."""
    meant = {"#000000": 0, **colours}
    mask, unknown = look_up(
        packed(pixels), {number_of(colour): number for colour, number in meant.items() if number <= classes}
    )
    if unknown:
        raise BrokenSampleError(
            f"unknown label colour {listed(unknown, colour_of)} (classes are 0..{classes})",
            f"name it under label_map in the site's site.yml, as '{colour_of(unknown[0])}': <class>, or raise "
            "preprocessing.classes; colours between two others come from smooth edges: export without them",
        )
    return mask, dict(colours)


def by_threshold(pixels: np.ndarray, threshold: float) -> tuple[np.ndarray, dict[str, int]]:
    """Return class 1 where [H, W], or the mean channel of [H, W, 3], is at least ``threshold``, else background."""
    grey = pixels if pixels.ndim == 2 else pixels.mean(axis=2)
    return (grey >= threshold).astype(np.uint8), {f">={threshold:g}": 1}


def look_up(values: np.ndarray, classes: Mapping[int, int], tally: Tally | None = None) -> tuple[np.ndarray, list[int]]:
    """Return the classes of integers. ``tally`` is their tally, if it is known.

    Returns:
        uint8 of the same shape, and the values that ``classes`` lacks, the most frequent first; their pixels are 0.
    """
    tally = tally or Tally.of(values)
    # A look-up by index takes eight bytes per pixel, too many for a volume, and is slower for few values.
    mask = np.zeros(values.shape, np.uint8)
    there = tally.values.tolist()
    for value in there:
        if number := classes.get(value):
            np.copyto(mask, number, where=values == value)
    named = classes.keys() >= set(there)
    return mask, [] if named else [value for value in tally.most_frequent_first() if value not in classes]


def occurrences(values: np.ndarray, of: Iterable[int]) -> np.ndarray:
    """Return how often each of some integers occurs in an array of any shape, int64."""
    return np.array([np.count_nonzero(values == value) for value in of], np.int64)


def packed(pixels: np.ndarray) -> np.ndarray:
    """Return each colour as one number 0xRRGGBB: uint8 [..., H, W, 3], or grey [H, W], to int64 [..., H, W].

    Raises:
        BrokenSampleError: channels of more than 8 bit.
    """
    if pixels.dtype != np.uint8:
        raise BrokenSampleError(f"a colour mask of {pixels.dtype}", "save it with 8 bit a channel")
    red, green, blue = (pixels,) * 3 if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    numbers: np.ndarray = (red.astype(np.int64) << 16) | (green.astype(np.int64) << 8) | blue
    return numbers


def listed(values: Iterable[int], write: Callable[[int], str]) -> str:
    """Return the first few values as text, and the number of the others."""
    names = [write(value) for value in values]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
