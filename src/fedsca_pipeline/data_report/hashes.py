"""Perceptual hashes of images, and groups of near duplicates by these hashes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 16
BITS = SIDE * SIDE
"""Bits of a hash. Each says whether one of the image's 16 x 16 lowest cosine frequencies is above their median."""

# Hashes that are compared with all others at once; the differences of such a block take 2 KiB per image.
_BLOCK = 64
_SEVERAL = -1


@dataclass(frozen=True)
class Group:
    """Near duplicates: their indices in the searched sequence, and the smallest distance between two, in bits."""

    members: tuple[int, ...]
    distance: int


def perceptual_hash(image: np.ndarray) -> str | None:
    """Return the pHash of an image uint8 [3, H, W] as 64 hex digits; None for an image of a single colour.

    The same image at another size, brightness or in another file format is a few bits away (measured in
    docs/data_report.md). A flipped or rotated image has a different hash.
    """
    if image.min() == image.max():
        return None
    return str(imagehash.phash(Image.fromarray(np.moveaxis(image, 0, -1)), hash_size=SIDE))


def near_duplicates(hashes: Sequence[str], owners: Sequence[Hashable], threshold: int) -> list[Group]:
    """Return groups of images whose hashes differ in at most ``threshold`` bits, directly or through others.

    Images of a single owner (such as slices of one patient) are expected to look alike and form no group by
    themselves. Time grows with the square of the number of different hashes, memory with the number of images and of
    pairs found.

    Args:
        hashes: hashes from ``perceptual_hash``.
        owners: owner of each image, in the same order.
        threshold: bits, at least 0.

    Returns:
        Groups of at least two images, nearest first; empty for fewer than two hashes.

    >>> one, near, far = "00" * 32, "01" + "00" * 31, "ff" * 32
    >>> near_duplicates([one, far, near], ["a", "b", "c"], threshold=8)
    [Group(members=(0, 2), distance=1)]
    """
    if len(hashes) < 2:
        return []
    different, hash_of = np.unique(np.array(hashes), return_inverse=True)
    owner = _sole_owners(hash_of, owners, len(different))
    shared = np.flatnonzero(owner == _SEVERAL)
    left, right, bits = _near_pairs(different, threshold)
    linked = (owner[left] != owner[right]) | (owner[left] == _SEVERAL)
    left, right, bits = (
        np.concatenate([own, of_pairs[linked]])
        for own, of_pairs in ((shared, left), (shared, right), (np.zeros(len(shared), np.int64), bits))
    )
    graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(len(different), len(different)))
    _, components = connected_components(graph, directed=False)
    nearest = np.full(len(different), BITS + 1)
    np.minimum.at(nearest, components[left], bits)
    groups = [
        Group(tuple(np.flatnonzero(components[hash_of] == component).tolist()), int(nearest[component]))
        for component in np.unique(components[left])
    ]
    return sorted(groups, key=lambda group: (group.distance, group.members))


def _sole_owners(hash_of: np.ndarray, owners: Sequence[Hashable], count: int) -> np.ndarray:
    """Return the owner's number of each different hash; ``_SEVERAL`` if images of several owners have the hash."""
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    numbered = np.array([numbers[owner] for owner in owners])
    least, greatest = np.full(count, len(numbers)), np.full(count, _SEVERAL)
    np.minimum.at(least, hash_of, numbered)
    np.maximum.at(greatest, hash_of, numbered)
    return np.where(least == greatest, least, _SEVERAL)


def _near_pairs(hashes: np.ndarray, threshold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the indices of every two hashes within the threshold, and the bits between them, int64 each."""
    words = np.array([np.frombuffer(bytes.fromhex(text), np.uint64) for text in hashes])
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        apart = np.zeros((len(block), len(words) - start), np.int16)
        for word in range(words.shape[1]):
            apart += np.bitwise_count(block[:, None, word] ^ words[None, start:, word])
        rows, columns = np.nonzero(apart <= threshold)
        later = rows < columns
        rows, columns = rows[later], columns[later]
        found.append((rows + start, columns + start, apart[rows, columns].astype(np.int64)))
    left, right, bits = zip(*found, strict=True)
    return np.concatenate(left), np.concatenate(right), np.concatenate(bits)
