"""The distance between sites' images, and a two-dimensional map of the images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import polynomial_kernel

FEWEST = 4
"""Sites with fewer images are left out."""
MOST = 50
"""Of more sites a sample is compared: their pairs, and the table of them, grow with the square of the sites."""

_PERMUTATIONS = 199


def site_distances(features: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Return the squared maximum mean discrepancy of every two sites, with the kernel of the Kernel Inception Distance.

    The estimate is unbiased for any number of images: 0 on average for alike sites, so it can be slightly negative
    (Binkowski et al., *Demystifying MMD GANs*, arXiv 1801.01401; kernel ``(x . y / D + 1)^3``). Features are first
    scaled to zero mean and unit variance over all sites' images, each site weighing the same.

    Args:
        features: float [n, D] by site; sites with fewer than ``FEWEST`` images are left out. Of more than ``MOST``
            sites as many are drawn.
        seed: seed of the permutations and of the draw.

    Returns:
        ``sites``, ``distance`` and ``p`` of every two sites, in the given order. ``p`` is the share of random
        assignments of the images to the two sites with at least this distance, at least 0.005. Empty for fewer than
        two sites.
    """
    scaled = _scaled({site: rows for site, rows in features.items() if len(rows) >= FEWEST})
    rng = np.random.default_rng(seed)
    sites = list(scaled)
    if len(sites) > MOST:
        sites = [sites[place] for place in sorted(rng.choice(len(sites), MOST, replace=False))]
    found = []
    for one, other in combinations(sites, 2):
        kernel = polynomial_kernel(np.concatenate([scaled[one], scaled[other]]))
        distance, p = _mmd(kernel, len(scaled[one]), rng)
        found.append({"sites": [one, other], "distance": distance, "p": p})
    return found


def plane(features: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Return features [n, D] by site, projected on their first two principal components.

    Features are scaled as in ``site_distances``, whose distances use all D features.

    Returns:
        [n, 2] by site, and the share of variance that the plane shows. Sites with fewer than ``FEWEST`` images are left
        out; fewer than two sites give an empty mapping and 0.
    """
    scaled = _scaled({site: rows for site, rows in features.items() if len(rows) >= FEWEST})
    if len(scaled) < 2:
        return {}, 0.0
    components = PCA(n_components=2, svd_solver="full").fit(np.concatenate(list(scaled.values())))
    points = {site: components.transform(rows) for site, rows in scaled.items()}
    return points, float(components.explained_variance_ratio_.sum())


def _scaled(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not features:
        return {}
    centre = np.mean([rows.mean(0) for rows in features.values()], axis=0, dtype=np.float64)
    variance = np.mean([((rows - centre) ** 2).mean(0) for rows in features.values()], axis=0)
    # A constant feature stays at 0.
    spread = np.where(variance > 0, np.sqrt(variance), 1.0)
    return {site: (rows - centre) / spread for site, rows in features.items()}


def _mmd(kernel: np.ndarray, first: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the discrepancy of the first images from the others, and the share of permutations that reach it."""
    count = len(kernel)
    off = kernel - np.diag(np.diag(kernel))
    # Row 0: the sites as they are; the others: random assignments. 1: the image belongs to the first site.
    member = np.zeros((1 + _PERMUTATIONS, count))
    member[0, :first] = 1
    for row in member[1:]:
        row[rng.permutation(count)[:first]] = 1
    within_first = np.einsum("pi,pi->p", member @ off, member)
    within_other = np.einsum("pi,pi->p", (1 - member) @ off, 1 - member)
    between = np.einsum("pi,pi->p", member @ off, 1 - member)
    other = count - first
    values = within_first / (first * (first - 1)) + within_other / (other * (other - 1)) - 2 * between / (first * other)
    return float(values[0]), float(np.mean(values >= values[0]))
