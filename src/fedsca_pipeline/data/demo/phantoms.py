"""An anatomy-like phantom: a body with organs, vessels and cysts, and lesions among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

_BACKGROUND, _PARENCHYMA, _RIM, _CYST, _VESSEL, _LESION = 0.02, 0.40, 0.54, 0.15, 0.68, 0.80


@dataclass(frozen=True)
class Phantom:
    """A phantom before a scanner acquires it.

    ``tissue`` is float64 [S, S] in 0..1, ``inside`` bool [S, S] is the body, ``lesions`` bool [S, S] the truth.
    """

    tissue: np.ndarray
    inside: np.ndarray
    lesions: np.ndarray


def make_phantom(
    size: int,
    anatomy: np.random.Generator,
    view: np.random.Generator,
    *,
    lesions: int,
    radius: tuple[float, float],
    extent: float = 1.0,
) -> Phantom:
    """Return a phantom of ``size`` x ``size`` pixels.

    Args:
        size: pixels of a side.
        anatomy: stream for body, organs and vessels; the same start gives the same patient.
        view: stream for lesions, cysts and texture.
        lesions: their number; 0 gives an empty truth.
        radius: smallest and largest lesion radius, as a share of half the side.
        extent: half the side in body units; below 1 the field of view lies within the body.
    """
    canvas = _Canvas(size, extent)
    body = canvas.blob(anatomy, (0.0, 0.0), 0.88, wobble=0.05)
    tissue = np.full((size, size), _PARENCHYMA) + 0.05 * canvas.noise(anatomy, 0.20)
    for _ in range(4):
        organ = canvas.blob(anatomy, _somewhere(anatomy, 0.55), anatomy.uniform(0.18, 0.34), wobble=0.10)
        tissue = _paint(tissue, canvas.cover(organ, 0.03), _PARENCHYMA + anatomy.choice([-0.10, -0.06, 0.06, 0.10]))
    for _ in range(3):
        tissue = _paint(tissue, canvas.vessel(anatomy, anatomy.uniform(0.008, 0.022) * extent), _VESSEL)

    taken: list[tuple[float, float, float]] = []
    truth = np.zeros((size, size), bool)
    grain = canvas.noise(view, 0.035)
    for _ in range(lesions):
        reach = view.uniform(*radius) * extent
        centre = _free_place(view, taken, reach, min(0.62, 0.8 * extent))
        shape = canvas.blob(view, centre, reach, wobble=0.13)
        faint = view.uniform(0.7, 1.1)
        level = _PARENCHYMA + faint * (_LESION - _PARENCHYMA) + 0.07 * grain
        tissue = _paint(tissue, canvas.cover(shape, 0.012 * extent), level)
        truth |= shape < 1.0
    for _ in range(int(view.integers(1, 4))):
        reach = view.uniform(0.6, 1.0) * float(np.mean(radius)) * extent
        centre = _free_place(view, taken, reach, min(0.66, 0.85 * extent))
        shape = canvas.blob(view, centre, reach, wobble=0.05)
        free = ~truth
        # A cyst is dark and smooth; half of them have a bright wall.
        wall = view.choice([_PARENCHYMA, _VESSEL])
        tissue = _paint(tissue, canvas.cover(shape, 0.01 * extent) * free, wall)
        tissue = _paint(tissue, canvas.cover(shape * 1.28, 0.01 * extent) * free, _CYST)

    tissue += 0.02 * canvas.noise(view, 0.012)
    tissue = _paint(tissue, canvas.band(body, 0.93, 1.0), _RIM)
    tissue = _paint(tissue, canvas.band(body, 0.90, 0.93), 0.30)
    tissue = np.where(body < 1.0, tissue, _BACKGROUND)
    return Phantom(np.clip(tissue, 0.0, 1.0), body < 1.0, truth & (body < 0.9))


class _Canvas:
    """Pixel grid in body units: x to the right and y down, from -extent to extent."""

    def __init__(self, size: int, extent: float) -> None:
        axis = (np.arange(size) + 0.5) / size * 2.0 - 1.0
        self._y, self._x = np.meshgrid(axis * extent, axis * extent, indexing="ij")
        self._pixels = size / (2.0 * extent)

    def blob(
        self, rng: np.random.Generator, centre: tuple[float, float], radius: float, *, wobble: float
    ) -> np.ndarray:
        """Return the distance from the centre of a turned, wavy ellipse, 1 on its outline. Its area is pi r^2."""
        turn, stretch = rng.uniform(0.0, np.pi), np.sqrt(rng.uniform(0.72, 1.0))
        dy, dx = self._y - centre[0], self._x - centre[1]
        along = (dx * np.cos(turn) + dy * np.sin(turn)) * stretch
        across = (dy * np.cos(turn) - dx * np.sin(turn)) / stretch
        turns = np.linspace(-np.pi, np.pi, 361)
        outline = np.ones_like(turns)
        for order in range(2, 7):
            outline += rng.normal(0.0, wobble / order) * np.cos(order * turns + rng.uniform(0.0, 2.0 * np.pi))
        reach = np.interp(np.arctan2(across, along), turns, np.maximum(outline, 0.5))
        return np.asarray(np.hypot(along, across) / (radius * reach))

    def cover(self, blob: np.ndarray, edge: float) -> np.ndarray:
        """Return the opacity 0..1 of a blob with a soft edge about ``edge`` body units wide."""
        return np.asarray(ndimage.gaussian_filter((blob < 1.0).astype(np.float64), edge * self._pixels))

    def band(self, blob: np.ndarray, inner: float, outer: float) -> np.ndarray:
        """Return the opacity of the ring between two levels of a blob."""
        ring = ((blob >= inner) & (blob < outer)).astype(np.float64)
        return np.asarray(ndimage.gaussian_filter(ring, 0.004 * self._pixels))

    def noise(self, rng: np.random.Generator, scale: float) -> np.ndarray:
        """Return smooth noise of mean 0 and standard deviation 1; ``scale`` is its grain in body units."""
        grain = max(scale * self._pixels, 0.5)
        field = ndimage.gaussian_filter(rng.standard_normal(self._x.shape), grain, mode="wrap", truncate=3.0)
        return np.asarray((field - field.mean()) / field.std())

    def vessel(self, rng: np.random.Generator, radius: float) -> np.ndarray:
        """Return the opacity of a bent tube across the body."""
        heading = rng.uniform(0.0, 2.0 * np.pi)
        start = 0.8 * np.array([np.cos(heading), np.sin(heading)])
        steps = np.linspace(0.0, 1.0, 6)[:, None]
        way = start * (1.0 - 1.7 * steps) + np.vstack([np.zeros(2), rng.normal(0.0, 0.17, (5, 2))])
        points = spline_through(way, 2000).T
        side = self._x.shape[0]
        column, row = np.floor(points * self._pixels + side / 2).astype(int)
        seen = (row >= 0) & (row < side) & (column >= 0) & (column < side)
        line = np.ones(self._x.shape, bool)
        line[row[seen], column[seen]] = False
        if not seen.any():
            return np.zeros(self._x.shape)
        distance = ndimage.distance_transform_edt(line) / self._pixels
        return np.asarray(np.clip((radius - distance) * self._pixels + 0.5, 0.0, 1.0))


def spline_through(points: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` points [count, 2] of the cubic spline through six points [6, 2].

    It is that of ``scipy.interpolate.splprep``, without the seconds that importing it takes: its parameter is the way
    along the points, and it bends freely at the first and last but one ("not a knot").
    """
    way = np.cumsum(np.hypot(*np.diff(points, axis=0).T))
    at = np.array([0.0, *way / way[-1]])

    def basis(u: np.ndarray) -> np.ndarray:
        return np.stack([np.ones_like(u), u, u**2, u**3, *(np.maximum(u - at[knot], 0.0) ** 3 for knot in (2, 3))], 1)

    return np.asarray(basis(np.linspace(0.0, 1.0, count)) @ np.linalg.solve(basis(at), points))


def _paint(tissue: np.ndarray, opacity: np.ndarray, level: np.ndarray | float) -> np.ndarray:
    return tissue + opacity * (level - tissue)


def _somewhere(rng: np.random.Generator, reach: float) -> tuple[float, float]:
    angle, distance = rng.uniform(0.0, 2.0 * np.pi), reach * np.sqrt(rng.uniform())
    return float(distance * np.sin(angle)), float(distance * np.cos(angle))


def _free_place(
    rng: np.random.Generator, taken: list[tuple[float, float, float]], radius: float, reach: float
) -> tuple[float, float]:
    """Return, and add to ``taken``, a centre whose blob overlaps no earlier one, or the best of 40 tries."""

    def clearance(place: tuple[float, float]) -> float:
        return min((np.hypot(place[0] - y, place[1] - x) - r - radius for y, x, r in taken), default=np.inf)

    tries = [_somewhere(rng, reach) for _ in range(40)]
    place = next((there for there in tries if clearance(there) > 0), max(tries, key=clearance))
    taken.append((*place, radius))
    return place
