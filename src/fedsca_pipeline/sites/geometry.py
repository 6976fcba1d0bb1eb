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
    low, high, warnings = _RANGES[config.method](image, config)
    if not low < high:
        return np.zeros(image.shape, np.float32), ["constant image: all zero after normalisation"]
    scaled = (image.astype(np.float64) - low) * (255.0 / (high - low))
    return np.clip(scaled, 0.0, 255.0).astype(np.float32), warnings


def fitted_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) scaled so that the longer one is ``side``; each at least 1."""
    scale = side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_image(image: np.ndarray, side: int) -> np.ndarray:
    """Resize float [H, W] or [H, W, 3] of range 0..255 (bilinear, anti-aliased) to uint8 [3, height, width]."""
    height, width = fitted_size(*image.shape[:2], side)
    channels = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    resized = [_resize(np.ascontiguousarray(channel), height, width, Image.Resampling.BILINEAR) for channel in channels]
    levels = np.rint(np.stack(resized)).astype(np.uint8)
    return np.broadcast_to(levels, (3, height, width))


def fit_mask(mask: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 classes [H, W] (nearest neighbour) to uint8 [height, width]."""
    return _resize(mask, *fitted_size(*mask.shape, side), Image.Resampling.NEAREST)


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
