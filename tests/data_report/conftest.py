"""Raw sites to inspect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

SIDE = 64


def make_scene(seed: int, side: int = 96) -> np.ndarray:
    """Return blurred noise, uint8 [side, side], with detail at every scale that a hash uses."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), side / 64)
    return np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def scene() -> Callable[..., np.ndarray]:
    """``make_scene``."""
    return make_scene


@pytest.fixture
def add_image(tmp_path: Path) -> Callable[..., None]:
    """Writes an image, given or drawn from a seed, and its mask with a square of class 1 to ``tmp_path/raw/<site>``."""

    def add(site: str, name: str, image: int | np.ndarray, mask: np.ndarray | None = None) -> None:
        pixels = make_scene(image, SIDE) if isinstance(image, int) else image
        if mask is None:
            mask = np.zeros(pixels.shape[:2], np.uint8)
            mask[8:20, 8:20] = 1
        save(tmp_path / "raw" / site / "images" / name, pixels)
        save(tmp_path / "raw" / site / "masks" / f"{Path(name).stem}.png", mask)

    return add


@pytest.fixture
def raw(tmp_path: Path, add_image: Callable[..., None]) -> Path:
    """Two sites, north and south, with ten different images each."""
    for start, site in ((0, "north"), (100, "south")):
        for number in range(10):
            add_image(site, f"{site}{number:02d}.png", start + number)
    return tmp_path / "raw"
