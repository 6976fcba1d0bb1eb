"""Perceptual hashes, and which images they say are nearly the same."""

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
"""Bits of a hash: of the 16 x 16 lowest frequencies of an image's cosine transform, which are above their median."""

# Rows of hashes compared with all others at once: a block's differences take 2 KiB an image.
_BLOCK = 64
_SEVERAL = -1


@dataclass(frozen=True)
class Group:
    """Images that are nearly the same: their places in the sequence searched, and the fewest bits between two."""

    members: tuple[int, ...]
    distance: int


def perceptual_hash(image: np.ndarray) -> str | None:
    """Return the pHash of an image uint8 [3, H, W] as 64 hex digits; None where it has one colour only.

    The same picture at another size, brightness or in another file format is a few bits away, which
    docs/data_report.md has measured; flipped or turned it is another picture.
    """
    if image.min() == image.max():
        return None
    return str(imagehash.phash(Image.fromarray(np.moveaxis(image, 0, -1)), hash_size=SIDE))


def near_duplicates(hashes: Sequence[str], owners: Sequence[Hashable], threshold: int) -> list[Group]:
    """Group images whose hashes differ in at most ``threshold`` bits, directly or by way of others in the group.

    Images of one owner (slices of a patient) are alike by nature: they make no group by themselves. Time grows with
    the square of the number of different hashes, memory with the number of images and of pairs found.

    Args:
        hashes: of ``perceptual_hash``.
        owners: whose each image is, in the same order.
        threshold: bits, from 0.

    Returns:
        Groups of two and more, nearest first; none for fewer than two hashes.
    """
    if len(hashes) < 2:
        return []
    different, places = np.unique(np.array(hashes), return_inverse=True)
    owner = _sole_owners(places, owners, len(different))
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
        Group(tuple(np.flatnonzero(components[places] == component).tolist()), int(nearest[component]))
        for component in np.unique(components[left])
    ]
    return sorted(groups, key=lambda group: (group.distance, group.members))


def _sole_owners(places: np.ndarray, owners: Sequence[Hashable], count: int) -> np.ndarray:
    """Number the owner of each different hash; ``_SEVERAL`` where images of several owners have it."""
    numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
    numbered = np.array([numbers[owner] for owner in owners])
    least, greatest = np.full(count, len(numbers)), np.full(count, _SEVERAL)
    np.minimum.at(least, places, numbered)
    np.maximum.at(greatest, places, numbered)
    return np.where(least == greatest, least, _SEVERAL)


def _near_pairs(hashes: np.ndarray, threshold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the places of every two hashes within the threshold, and the bits between them, int64 each."""
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
