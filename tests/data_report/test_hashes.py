"""Near duplicates are found after common changes to the copy, and different images are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsca_pipeline.config import DataReportConfig, NormaliseConfig
from fedsca_pipeline.data.preprocessing.geometry import fit_image, normalise
from fedsca_pipeline.data_report.hashes import BITS, Group, near_duplicates, perceptual_hash

THRESHOLD = DataReportConfig().near_duplicate_bits


def hash_of(pixels: np.ndarray, side: int = 64) -> str:
    """Return the hash as in the report: of the normalised, resized image."""
    found = perceptual_hash(fit_image(normalise(pixels, NormaliseConfig())[0], side))
    assert found is not None
    return found


def apart(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    side = round(len(pixels) * factor)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


class TestOneImage:
    @given(st.integers(0, 10_000), st.floats(0.5, 2.0))
    def test_a_resized_image_is_a_near_duplicate(self, scene: Callable, seed: int, factor: float) -> None:
        picture = scene(seed)

        assert apart(hash_of(picture), hash_of(resized(picture, factor))) <= THRESHOLD

    @given(st.integers(0, 10_000), st.floats(0.2, 1.0), st.floats(0.0, 50.0))
    def test_an_image_of_another_brightness_and_contrast_is_a_near_duplicate(
        self, scene: Callable, seed: int, factor: float, shift: float
    ) -> None:
        picture = scene(seed)

        assert apart(hash_of(picture), hash_of((picture * factor + shift).astype(np.uint16))) <= THRESHOLD

    @given(st.integers(0, 10_000), st.integers(30, 95))
    def test_an_image_in_another_format_is_a_near_duplicate(self, scene: Callable, seed: int, quality: int) -> None:
        picture = scene(seed)

        assert apart(hash_of(picture), hash_of(as_jpeg(picture, quality))) <= THRESHOLD
        assert apart(hash_of(picture), hash_of(picture.astype(np.uint16) * 257)) <= THRESHOLD
        assert apart(hash_of(picture), hash_of(np.stack([picture] * 3, axis=-1))) <= THRESHOLD

    @given(st.integers(0, 10_000))
    def test_a_different_image_is_far_away(self, scene: Callable, seed: int) -> None:
        assert apart(hash_of(scene(seed)), hash_of(scene(seed + 20_000))) > 2 * THRESHOLD

    @pytest.mark.parametrize("level", [0, 90, 255])
    def test_an_image_of_a_single_colour_has_no_hash(self, level: int) -> None:
        assert perceptual_hash(np.full((3, 20, 20), level, np.uint8)) is None


@st.composite
def hashed_images(draw: st.DrawFn) -> tuple[list[str], list[int], int]:
    """Return hashes in clusters of a few bits, their owners, and a threshold near the clusters' width."""
    centres = draw(st.lists(st.integers(0, 2**BITS - 1), min_size=1, max_size=4))
    hashes = []
    for _ in range(draw(st.integers(0, 9))):
        value = draw(st.sampled_from(centres))
        for bit in draw(st.lists(st.integers(0, BITS - 1), max_size=6)):
            value ^= 1 << bit
        hashes.append(f"{value:064x}")
    owners = draw(st.lists(st.integers(0, 2), min_size=len(hashes), max_size=len(hashes)))
    return hashes, owners, draw(st.integers(0, 8))


class TestGroups:
    @given(hashed_images())
    def test_groups_equal_those_from_comparing_every_two_images(self, images: tuple[list[str], list[int], int]) -> None:
        hashes, owners, threshold = images
        group = {place: {place} for place in range(len(hashes))}
        nearest: dict[int, int] = {}
        linked = [
            (one, other, apart(hashes[one], hashes[other]))
            for one, other in combinations(range(len(hashes)), 2)
            if owners[one] != owners[other] and apart(hashes[one], hashes[other]) <= threshold
        ]
        for one, other, _ in linked:
            joined = group[one] | group[other]
            group.update(dict.fromkeys(joined, joined))
        for one, _, bits in linked:
            first = min(group[one])
            nearest[first] = min(bits, nearest.get(first, BITS))

        found = near_duplicates(hashes, owners, threshold)

        assert {found_.members: found_.distance for found_ in found} == {
            tuple(sorted(group[first])): bits for first, bits in nearest.items()
        }
        assert found == sorted(found, key=lambda found_: (found_.distance, found_.members))

    def test_images_of_one_owner_form_no_group_by_themselves(self) -> None:
        same = "0" * 64

        assert near_duplicates([same, same], ["p1", "p1"], THRESHOLD) == []
        assert near_duplicates([same, same, same], ["p1", "p2", "p1"], THRESHOLD) == [Group((0, 1, 2), 0)]

    def test_many_copies_of_one_image_are_one_group(self) -> None:
        assert near_duplicates(["f" * 64] * 3000, list(range(3000)), 0) == [Group(tuple(range(3000)), 0)]

    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two_images_form_no_group(self, count: int) -> None:
        assert near_duplicates(["0" * 64] * count, [0] * count, BITS) == []
