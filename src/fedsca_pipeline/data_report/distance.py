"""How far apart sites' images are, and a plane to see it in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import polynomial_kernel

FEWEST = 4
"""Images below which nothing is said of a site."""

_PERMUTATIONS = 199


def site_distances(features: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """Measure every two sites' squared maximum mean discrepancy, with the kernel of the Kernel Inception Distance.

    The estimate is unbiased at any number of images, 0 on average for sites whose images are alike, so it may be
    slightly negative (Binkowski et al., *Demystifying MMD GANs*, 2018; kernel ``(x . y / D + 1)^3``). Features are
    centred and brought to unit variance over all sites' images first, each site weighing the same.

    Args:
        features: float [n, D] by site; sites with fewer than ``FEWEST`` images are left out.
        seed: of the permutations.

    Returns:
        For each two sites, in the order given, ``sites``, ``distance``, and ``p``: how often images dealt to the two
        sites at random are as far apart, from 0.005 on. Empty for fewer than two sites.
    """
    scaled = _scaled({site: rows for site, rows in features.items() if len(rows) >= FEWEST})
    rng = np.random.default_rng(seed)
    found = []
    for one, other in combinations(scaled, 2):
        kernel = polynomial_kernel(np.concatenate([scaled[one], scaled[other]]))
        distance, p = _mmd(kernel, len(scaled[one]), rng)
        found.append({"sites": [one, other], "distance": distance, "p": p})
    return found


def plane(features: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Project features [n, D] by site on their first two principal components.

    Scaled as for the distances, which are of all D features, not of this plane.

    Returns:
        [n, 2] by site, and the share of variance that the plane shows. Sites of fewer than ``FEWEST`` images are left
        out; empty, and 0, for fewer than two sites.
    """
    scaled = _scaled({site: rows for site, rows in features.items() if len(rows) >= FEWEST})
    if len(scaled) < 2:
        return {}, 0.0
    components = PCA(n_components=2, svd_solver="full").fit(np.concatenate(list(scaled.values())))
    places = {site: components.transform(rows) for site, rows in scaled.items()}
    return places, float(components.explained_variance_ratio_.sum())


def _scaled(features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not features:
        return {}
    centre = np.mean([rows.mean(0) for rows in features.values()], axis=0, dtype=np.float64)
    variance = np.mean([((rows - centre) ** 2).mean(0) for rows in features.values()], axis=0)
    # A feature that is the same everywhere stays at 0.
    spread = np.where(variance > 0, np.sqrt(variance), 1.0)
    return {site: (rows - centre) / spread for site, rows in features.items()}


def _mmd(kernel: np.ndarray, first: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return the discrepancy of the first images and the others, and the share of random deals that reach it."""
    count = len(kernel)
    off = kernel - np.diag(np.diag(kernel))
    dealt = np.zeros((1 + _PERMUTATIONS, count))
    dealt[0, :first] = 1
    for row in dealt[1:]:
        row[rng.permutation(count)[:first]] = 1
    within_first = np.einsum("pi,pi->p", dealt @ off, dealt)
    within_other = np.einsum("pi,pi->p", (1 - dealt) @ off, 1 - dealt)
    between = np.einsum("pi,pi->p", dealt @ off, 1 - dealt)
    other = count - first
    values = within_first / (first * (first - 1)) + within_other / (other * (other - 1)) - 2 * between / (first * other)
    return float(values[0]), float(np.mean(values >= values[0]))
