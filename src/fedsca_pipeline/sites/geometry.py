"""Aspect-keeping resize and padding at the bottom and right; values to 0..255."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from fedsca_pipeline.config import NormaliseConfig


def normalise(image: np.ndarray, config: NormaliseConfig) -> tuple[np.ndarray, list[str]]:
    """Map raw intensities to float32 0..255, all channels by one scale so that colours keep their balance.

    ``image`` is [H, W] or [H, W, 3] of any real type, not yet padded or resized. A constant image becomes zeros. The
    second value holds warnings for the data report.
    """
    low, high, warnings = intensity_range(image, config)
    return to_levels(image, low, high), warnings


def intensity_range(image: np.ndarray, config: NormaliseConfig) -> tuple[float, float, list[str]]:
    """Return the raw intensities that become 0 and 255, and warnings; of a constant image they are not in order."""
    low, high, warnings = _RANGES[config.method](image, config)
    return low, high, warnings if low < high else ["constant image: all zero after normalisation"]


def to_levels(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map ``low`` to 0 and ``high`` to 255, float32, and clip what is beyond; all 0 where ``low`` is not below."""
    if not low < high:
        return np.zeros(image.shape, np.float32)
    scaled = (image.astype(np.float64) - low) * (255.0 / (high - low))
    return np.clip(scaled, 0.0, 255.0).astype(np.float32)


def fitted_size(height: float, width: float, side: int) -> tuple[int, int]:
    """Return (height, width), in any unit, scaled so that the longer one is ``side`` pixels; each at least 1."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_image(image: np.ndarray, side: int, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Resize float [H, W] or [H, W, 3] of range 0..255 (bilinear, anti-aliased) to uint8 [3, height, width].

    ``pixel`` is the height and width of a pixel: what is resized keeps the aspect of what is seen.
    """
    height, width = fitted_size(image.shape[0] * pixel[0], image.shape[1] * pixel[1], side)
    channels = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    resized = [_resize(np.ascontiguousarray(channel), height, width, Image.Resampling.BILINEAR) for channel in channels]
    levels = np.rint(np.stack(resized)).astype(np.uint8)
    return np.broadcast_to(levels, (3, height, width))


def fit_mask(mask: np.ndarray, side: int, pixel: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Resize uint8 classes [H, W] (nearest neighbour) to uint8 [height, width]; ``pixel`` as in ``fit_image``."""
    height, width = fitted_size(mask.shape[0] * pixel[0], mask.shape[1] * pixel[1], side)
    return _resize(mask, height, width, Image.Resampling.NEAREST)


def _resize(plane: np.ndarray, height: int, width: int, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((width, height), method))


def _percentile(image: np.ndarray, config: NormaliseConfig) -> tuple[float, float, list[str]]:
    low, high = np.percentile(image, (config.lower, config.upper))
    if low < high:
        return low, high, []
    low, high, _ = _minmax(image, config)
    return low, high, [f"percentiles {config.lower:g} and {config.upper:g} coincide: its full range is used"]


def _minmax(image: np.ndarray, _config: NormaliseConfig) -> tuple[float, float, list[str]]:
    return float(image.min()), float(image.max()), []


def _window(_image: np.ndarray, config: NormaliseConfig) -> tuple[float, float, list[str]]:
    centre, width = config.window_centre, config.window_width
    if centre is None or width is None:
        raise ValueError("method: window needs window_centre and window_width")
    return centre - width / 2, centre + width / 2, []


def _none(image: np.ndarray, _config: NormaliseConfig) -> tuple[float, float, list[str]]:
    outside = image.min() < 0 or image.max() > 255
    return 0.0, 255.0, ["normalise: none, but values leave 0..255 and are clipped"] if outside else []


_RANGES: Mapping[str, Callable[[np.ndarray, NormaliseConfig], tuple[float, float, list[str]]]] = MappingProxyType(
    {"percentile": _percentile, "minmax": _minmax, "window": _window, "none": _none}
)
