"""Four demonstration sites: phantoms of one anatomy with lesions, acquired by four scanners.

Sites differ in contrast, colour, blur, noise, bias field, field of view, and in size and number of lesions. Lesions
resemble the cysts and vessels beside them, so the foundation fails at the task without training.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.data.demo.phantoms import Phantom, make_phantom
from fedsca_pipeline.data.readers.common import split_name
from fedsca_pipeline.data.site_folder.discovery import (
    DEMO_SITES,
    SITES_READY,
    demonstration_sites,
    discover_sites,
    place_finished_sites,
)
from fedsca_pipeline.data.site_folder.pairing import SUFFIXES
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.files import write_bytes

_EMPTY_EVERY = 10


@dataclass(frozen=True)
class _Scanner:
    """The acquisition at one site.

    ``lesions`` is the smallest and largest number of lesions, ``radius`` their size as a share of half the side,
    ``extent`` half the side in body units. ``acquire`` turns a phantom and a seed into uint8 [S, S] or [S, S, 3], and
    bool [S, S], the field of view.
    """

    shift: str
    lesions: tuple[int, int]
    radius: tuple[float, float]
    extent: float
    acquire: Callable[[Phantom, int], tuple[np.ndarray, np.ndarray]]


def write_demo_sites(raw: Path, config: DemoSitesConfig) -> dict[str, dict[str, Any]]:
    """Write the four sites of ``DEMO_SITES`` as PNG site folders, if there is no site under ``raw`` yet.

    The sites are built in a hidden folder and renamed, so a killed run leaves no half site. The same configuration
    gives the same bytes. Existing sites are never changed.

    Returns:
        Per site ``images``, their number, and ``shift``, how the site differs ("already there" for an existing site).

    Raises:
        DataError: there are folders, but none is a site: the user probably meant to use their own data.
    """
    place_finished_sites(raw)
    if present := discover_sites(raw):
        return {site: {"images": _count(raw / site / "images"), "shift": "already there"} for site in present}
    if folders := sorted(path.name for path in raw.glob("[!._]*") if path.is_dir()):
        raise DataError(
            f"{raw}: no site in {', '.join(folders)}; a site is a folder with images/ and masks/ in it. "
            "Rename what is there, or empty the folder to get the demonstration sites"
        )
    workshop = raw / ".demo_sites.partial"
    try:
        # A killed run may have left its workshop behind.
        shutil.rmtree(workshop, ignore_errors=True)
        for index, site in enumerate(DEMO_SITES):
            _write_site(workshop / site, index, _SCANNERS[site], config)
        workshop.rename(raw / SITES_READY)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    place_finished_sites(raw)
    return {site: {"images": config.images_per_site, "shift": _SCANNERS[site].shift} for site in DEMO_SITES}


def unlike(raw: Path, config: DemoSitesConfig) -> str:
    """Return how the demonstration sites in ``raw`` differ from ``config`` in number or size of images; "": not at all.

    The first site that differs is described, by its first image. A file that is no image is passed over.
    """
    for site in demonstration_sites(raw):
        first = min((raw / site / "images").glob("*.png"), default=None)
        try:
            size = config.image_size if first is None else Image.open(first).width
        except OSError:
            continue
        if (found := (_count(raw / site / "images"), size)) != (config.images_per_site, config.image_size):
            return f"{found[0]} images of {size} px, not {config.images_per_site} of {config.image_size} px"
    return ""


def _count(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(split_name(path.name)[1] in SUFFIXES for path in folder.iterdir() if not path.name.startswith("."))


def _write_site(folder: Path, index: int, scanner: _Scanner, config: DemoSitesConfig) -> None:
    for number in range(config.images_per_site):
        # Every third subject has two images, so that the split by subject matters.
        subject, view = 3 * (number // 4) + min(number % 4, 2), 1 + (number % 4 == 3)
        body = np.random.default_rng([config.seed, index, subject])
        rng = np.random.default_rng([config.seed, index, subject, view])
        count = 0 if number % _EMPTY_EVERY == _EMPTY_EVERY - 1 else int(rng.integers(*scanner.lesions, endpoint=True))
        phantom = make_phantom(
            config.image_size, body, rng, lesions=count, radius=scanner.radius, extent=scanner.extent
        )
        image, seen = scanner.acquire(phantom, int(rng.integers(2**31)))
        name = f"p{subject:03d}_{view}.png"
        _write_png(folder / "images" / name, image)
        _write_png(folder / "masks" / name, (phantom.lesions & seen).astype(np.uint8) * 255)
    notes = f"Demonstration phantom, no patient: {scanner.shift}."
    write_bytes(folder / "site.yml", f'group: "^(p[0-9]+)_"\nspacing: [0.8, 0.8]\nnotes: "{notes}"\n'.encode())


def _write_png(path: Path, pixels: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    write_bytes(path, stream.getvalue())


def _ct(phantom: Phantom, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from skimage import exposure, filters, util

    image = filters.gaussian(phantom.tissue, 1.0)
    # Low dose: noise with a grain of a few pixels, as after reconstruction.
    grain = filters.gaussian(util.random_noise(np.zeros_like(image), "gaussian", rng=seed, var=1.0, clip=False), 0.7)
    image = exposure.rescale_intensity(image + 0.06 * grain, in_range=(0.05, 0.95), out_range=(0.0, 1.0))
    seen = _disc(image.shape[0], 1.0)
    return _to_bytes(image * seen), seen


def _mri(phantom: Phantom, seed: int) -> tuple[np.ndarray, np.ndarray]:
    inverted = np.where(phantom.inside, 0.95 - 0.85 * phantom.tissue, 0.0).astype(np.float32)
    biased = inverted * _bias_field(inverted.shape, seed, degree=3, strength=0.18)
    image = _rician(_without_high_frequencies(biased, 0.35), seed, 0.06)
    return _to_bytes(image), np.ones(image.shape, bool)


def _ultrasound(phantom: Phantom, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from skimage import exposure, filters, util

    size = phantom.tissue.shape[0]
    depth = np.linspace(0.0, 1.0, size)[:, None]
    echo = phantom.tissue * np.exp(-0.6 * depth)
    speckled = util.random_noise(echo, "speckle", rng=seed, var=0.3, clip=False)
    # The beam is wider than the pulse is long.
    spread = np.abs(filters.gaussian(speckled, (0.6, 1.6)))
    image = exposure.adjust_log(np.clip(1.5 * spread, 0.0, 1.0), 1.0)
    seen = _sector(size)
    return _to_bytes(image * seen), seen


def _endoscopy(phantom: Phantom, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from skimage import filters, util

    size = phantom.tissue.shape[0]
    tissue = filters.gaussian(phantom.tissue, 1.6)
    levels = np.linspace(0.0, 1.0, len(_MUCOSA))
    colour = np.stack([np.interp(tissue, levels, channel) for channel in np.array(_MUCOSA).T])
    light = _bias_field(tissue.shape, seed, degree=2, strength=0.15)
    colour = np.moveaxis((colour.astype(np.float32) * light).astype(np.float32), 0, -1)
    seen = _disc(size, 0.97)
    distance = np.hypot(*np.meshgrid(*[np.linspace(-1.0, 1.0, size)] * 2))
    lit = util.random_noise(colour * (1.05 - 0.35 * distance**2)[..., None], "gaussian", rng=seed, var=2e-4)
    return _to_bytes(lit * seen[..., None]), seen


def _bias_field(shape: tuple[int, ...], seed: int, degree: int, strength: float) -> np.ndarray:
    """Return a smooth field around 1: the exponential of Legendre polynomials, as in MONAI's ``RandBiasField``."""
    draws = np.random.RandomState(seed)
    draws.rand()
    lower = np.tril_indices(degree + 1)
    coefficients = np.zeros((degree + 1, degree + 1))
    coefficients[lower] = draws.uniform(-strength, strength, len(lower[0]))
    rows, columns = (np.linspace(-1.0, 1.0, side, dtype=np.float32) for side in shape)
    return np.exp(np.polynomial.legendre.leggrid2d(rows, columns, coefficients))


def _without_high_frequencies(image: np.ndarray, share: float) -> np.ndarray:
    """Return the image with Gibbs ringing: without the frequencies beyond 1 - ``share`` of the largest."""
    import torch

    frequencies = np.fft.fftshift(torch.fft.fft2(torch.from_numpy(image.astype(np.float32))).numpy())
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in image.shape)
    radius = (1 - share) * max(image.shape) * np.sqrt(2) / 2.0
    kept = frequencies * (np.sqrt(rows[:, None] ** 2 + columns**2) <= radius)
    ringing: np.ndarray = torch.fft.ifft2(torch.from_numpy(np.fft.ifftshift(kept))).real.numpy()
    return ringing


def _rician(image: np.ndarray, seed: int, strength: float) -> np.ndarray:
    """Return the magnitude of the image and complex noise, as MONAI's ``RandRicianNoise`` draws it."""
    import torch

    draws = np.random.RandomState(seed)
    draws.rand()
    real, imaginary = (torch.from_numpy(draws.normal(0.0, strength, image.shape).astype(np.float32)) for _ in range(2))
    magnitude: np.ndarray = torch.sqrt((torch.from_numpy(image) + real) ** 2 + imaginary**2).numpy()
    return magnitude


def _to_bytes(image: np.ndarray) -> np.ndarray:
    levels: np.ndarray = np.rint(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels


def _disc(size: int, radius: float) -> np.ndarray:
    axis = np.linspace(-1.0, 1.0, size)
    return np.hypot(axis[:, None], axis[None, :]) <= radius


def _sector(size: int) -> np.ndarray:
    """Return the fan of a curved probe above the image."""
    axis = np.linspace(-1.0, 1.0, size)
    y, x = axis[:, None] + 2.1, axis[None, :]
    reach = np.hypot(y, x)
    return (np.abs(np.arctan2(x, y)) < 0.42) & (reach > 1.2) & (reach < 3.02)


# Dark blood, red mucosa, pale polyp: red, green, blue over rising tissue values.
_MUCOSA = ((0.12, 0.02, 0.03), (0.45, 0.12, 0.10), (0.78, 0.38, 0.30), (0.93, 0.62, 0.50), (1.0, 0.88, 0.76))

_SCANNERS: Mapping[str, _Scanner] = MappingProxyType(
    {
        "harbour_ct": _Scanner("low-dose noise, wide field of view, small lesions", (1, 3), (0.12, 0.20), 1.0, _ct),
        "meadow_mri": _Scanner("inverted contrast, bias field, Rician noise", (1, 2), (0.16, 0.26), 0.95, _mri),
        "summit_ultrasound": _Scanner("speckle, attenuation, sector", (1, 2), (0.20, 0.32), 0.75, _ultrasound),
        "valley_endoscopy": _Scanner(
            "colour, blur, close view, one large lesion", (1, 1), (0.28, 0.44), 0.6, _endoscopy
        ),
    }
)
