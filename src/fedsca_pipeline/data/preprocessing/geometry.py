"""Intensities to 0..255, and resizing that keeps the aspect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image

from fedsca_pipeline.config import NormaliseConfig


@dataclass(frozen=True)
class ByteCounts:
    """How often each value occurs in 8 bit pixels, int64 [256]; there is at least one pixel."""

    counts: np.ndarray

    @classmethod
    def of(cls, planes: Iterable[np.ndarray], times: int = 1) -> ByteCounts:
        """Return the counts over uint8 [H, W] planes together, each plane counted ``times`` times."""
        counts = np.asarray(sum(np.array(Image.fromarray(plane).histogram()) for plane in planes))
        return cls(times * counts)

    @property
    def values(self) -> np.ndarray:
        """The values that occur, ascending."""
        return np.flatnonzero(self.counts)

    def min(self) -> int:
        """Return the smallest value."""
        return int(self.values[0])

    def max(self) -> int:
        """Return the largest value."""
        return int(self.values[-1])

    def percentiles(self, at: Sequence[float]) -> list[float]:
        """Return ``np.percentile`` of all pixels (linear), equal to the last bit."""
        upto = np.cumsum(self.counts)
        found = []
        for share in at:
            place = (upto[-1] - 1) * np.true_divide(share, 100)
            below, above = np.searchsorted(upto, [np.floor(place), min(np.floor(place) + 1, upto[-1] - 1)], "right")
            step, part = above - below, place - np.floor(place)
            found.append(float(above - step * (1 - part) if part >= 0.5 else below + step * part))
        return found


@dataclass(frozen=True)
class Channels:
    """An image [H, W] or [H, W, 3] and its ``distinct`` channels: [1, H, W] if all are equal, else [3, H, W].

    ``counts`` are the value counts over all channels of an 8 bit image; None for other types.
    """

    image: np.ndarray
    distinct: np.ndarray
    counts: ByteCounts | None

    @classmethod
    def of(cls, image: np.ndarray) -> Channels:
        """Return an image with its distinct channels and counts."""
        planes = np.ascontiguousarray(image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0))
        grey = all(np.array_equal(planes[0], plane) for plane in planes[1:])
        distinct = planes[:1] if grey else planes
        counts = ByteCounts.of(distinct, len(planes) // len(distinct)) if image.dtype == np.uint8 else None
        return cls(image, distinct, counts)

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value."""
        values = self.distinct if self.counts is None else self.counts
        return float(values.min()), float(values.max())


def normalise(image: np.ndarray, config: NormaliseConfig) -> tuple[np.ndarray, list[str]]:
    """Return raw intensities as float32 0..255, all channels on one scale so that colours keep their balance.

    ``image`` is [H, W] or [H, W, 3] of any real type, not yet padded or resized. A constant image becomes zeros. The
    second value holds warnings for the data report.
    """
    low, high, warnings = intensity_range(image, config)
    return to_levels(image, low, high), warnings


def intensity_range(image: np.ndarray | ByteCounts, config: NormaliseConfig) -> tuple[float, float, list[str]]:
    """Return the raw intensities that become 0 and 255, and warnings. A constant image gives ``low >= high``."""
    low, high, warnings = _RANGES[config.method](image, config)
    return low, high, warnings if low < high else ["constant image: all zero after normalisation"]


def to_levels(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return float32 with ``low`` at 0 and ``high`` at 255, clipped; all 0 unless ``low < high``."""
    levels = np.zeros(image.shape, np.float32)
    if low < high:
        # Row by row: doubles of a whole image would be the peak of preprocessing's memory.
        for row, values in enumerate(image):
            levels[row] = np.clip((values.astype(np.float64) - low) * (255.0 / (high - low)), 0.0, 255.0)
    return levels


def normalise_and_fit(channels: Channels, config: NormaliseConfig, side: int) -> tuple[np.ndarray, list[str]]:
    """Return what ``normalise`` and ``fit_image`` give, bit for bit; 8 bit images use tables, which is faster.

    Returns:
        uint8 [3, height, width], and warnings.
    """
    if channels.counts is None:
        levels, warnings = normalise(channels.image, config)
        return fit_image(levels, side), warnings
    low, high, warnings = intensity_range(channels.counts, config)
    (table,) = to_levels(np.arange(256, dtype=np.uint8)[None], low, high)
    rows, columns = channels.image.shape[:2]
    height, width = fitted_size(rows, columns, side)
    if (height, width) == (rows, columns):
        levels = _by_table(channels.distinct, np.rint(table).astype(np.uint8))
    else:
        resized = [_resize(table.take(plane), height, width, Image.Resampling.BILINEAR) for plane in channels.distinct]
        levels = np.rint(np.stack(resized)).astype(np.uint8)
    return np.broadcast_to(levels, (3, height, width)), warnings


def fitted_size(height: float, width: float, side: int) -> tuple[int, int]:
    """Return (height, width), in any unit, scaled so that the longer one is ``side`` pixels; each at least 1."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_image(image: np.ndarray, side: int, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Return float [H, W] or [H, W, 3] of 0..255 resized (bilinear, anti-aliased) to uint8 [3, height, width].

    ``pixel`` is the height and width of a pixel; the result has square pixels.
    """
    height, width = fitted_size(image.shape[0] * pixel[0], image.shape[1] * pixel[1], side)
    channels = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    resized = [_resize(np.ascontiguousarray(channel), height, width, Image.Resampling.BILINEAR) for channel in channels]
    levels = np.rint(np.stack(resized)).astype(np.uint8)
    return np.broadcast_to(levels, (3, height, width))


def fit_mask(mask: np.ndarray, side: int, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Return uint8 classes [H, W] resized (nearest neighbour) to [height, width]; ``pixel`` as in ``fit_image``."""
    height, width = fitted_size(mask.shape[0] * pixel[0], mask.shape[1] * pixel[1], side)
    return mask if (height, width) == mask.shape else _resize(mask, height, width, Image.Resampling.NEAREST)


def _by_table(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return uint8 values of any shape looked up in uint8 [256]; read-only."""
    # NumPy would first convert every pixel to an index of eight bytes.
    return np.frombuffer(pixels.tobytes().translate(table.tobytes()), np.uint8).reshape(pixels.shape)


def _resize(plane: np.ndarray, height: int, width: int, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((width, height), method))


def _percentile(image: np.ndarray | ByteCounts, config: NormaliseConfig) -> tuple[float, float, list[str]]:
    at = config.lower, config.upper
    low, high = image.percentiles(at) if isinstance(image, ByteCounts) else np.percentile(image, at)
    if low < high:
        return low, high, []
    low, high, _ = _minmax(image, config)
    return low, high, [f"percentiles {config.lower:g} and {config.upper:g} coincide: its full range is used"]


def _minmax(image: np.ndarray | ByteCounts, _config: NormaliseConfig) -> tuple[float, float, list[str]]:
    return float(image.min()), float(image.max()), []


def _window(_image: np.ndarray | ByteCounts, config: NormaliseConfig) -> tuple[float, float, list[str]]:
    centre, width = config.window_centre, config.window_width
    if centre is None or width is None:
        raise ValueError("method: window needs window_centre and window_width")
    return centre - width / 2, centre + width / 2, []


def _none(image: np.ndarray | ByteCounts, _config: NormaliseConfig) -> tuple[float, float, list[str]]:
    outside = image.min() < 0 or image.max() > 255
    return 0.0, 255.0, ["normalise: none, but values leave 0..255 and are clipped"] if outside else []


_Range = Callable[[np.ndarray | ByteCounts, NormaliseConfig], tuple[float, float, list[str]]]
_RANGES: Mapping[str, _Range] = MappingProxyType(
    {"percentile": _percentile, "minmax": _minmax, "window": _window, "none": _none}
)
