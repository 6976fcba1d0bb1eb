"""A volume cut into slices and put together again is the volume, however it lies."""

from __future__ import annotations

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.config import NormaliseConfig, VolumeConfig
from fedsca_pipeline.data.preprocessing.slices import VolumeSlices, choose_slices, cut, plane_spacing, restack
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume

PLAIN = NormaliseConfig(method="none")
EVERY_ORIENTATION = [
    np.diag(signs)[:, list(order)] for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)
]
# Value of a voxel by where it lies: right, anterior and superior of the origin, in mm.
MARKS = {"right": 1, "anterior": 10, "superior": 100}


def affine_of(axes: np.ndarray, spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    return affine


def grid(shape: tuple[int, int, int]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_cut_and_restacked_is_the_identity_in_every_orientation(axis: int) -> None:
    assert len(EVERY_ORIENTATION) == 48
    for axes in EVERY_ORIENTATION:
        affine, voxels = affine_of(axes), grid((2, 3, 4))
        np.testing.assert_array_equal(restack(cut(voxels, affine, axis), affine, axis), voxels)
        both = np.stack([voxels, -voxels], axis=-1)
        np.testing.assert_array_equal(restack(cut(both, affine, axis), affine, axis), both)


@given(
    st.integers(0, 47),
    st.integers(0, 2),
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(*[st.floats(-0.3, 0.3)] * 3),
    st.tuples(*[st.floats(0.2, 9.0)] * 3),
)
def test_cut_and_restacked_is_the_identity_of_oblique_grids_too(
    orientation: int,
    axis: int,
    shape: tuple[int, int, int],
    angles: tuple[float, float, float],
    spacing: tuple[float, float, float],
) -> None:
    turn = nibabel.eulerangles.euler2mat(*angles)
    affine = affine_of(turn @ EVERY_ORIENTATION[orientation], spacing)
    voxels = grid(shape)
    planes = cut(voxels, affine, axis)
    np.testing.assert_array_equal(restack(planes, affine, axis), voxels)
    assert sorted(plane_spacing(affine, axis)) == pytest.approx(sorted(spacing))


@pytest.mark.parametrize(
    ("axis", "slices", "rows", "columns"),
    [
        (0, "right", "inferior", "posterior"),
        (1, "anterior", "inferior", "left"),
        (2, "superior", "posterior", "left"),
    ],
)
def test_slices_stand_upright_whatever_the_file_does(axis: int, slices: str, rows: str, columns: str) -> None:
    opposite = {"left": "right", "posterior": "anterior", "inferior": "superior"}

    def step(direction: str) -> int:
        return -MARKS[opposite[direction]] if direction in opposite else MARKS[direction]

    for axes in EVERY_ORIENTATION:
        affine = affine_of(axes)
        index = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1)
        place = index @ affine[:3, :3].T
        planes = cut(place @ np.array(list(MARKS.values())), affine, axis)
        assert planes[1, 1, 1] + step(slices) == planes[2, 1, 1]
        assert planes[1, 1, 1] + step(rows) == planes[1, 2, 1]
        assert planes[1, 1, 1] + step(columns) == planes[1, 1, 2]


def test_spacing_goes_with_the_axes() -> None:
    axes = np.array([[0.0, 0.0, -1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # to anterior, superior, left
    affine = affine_of(axes, (0.5, 3.0, 0.75))
    assert plane_spacing(affine, 2) == pytest.approx((3.0, 0.5, 0.75))
    assert plane_spacing(affine, 1) == pytest.approx((0.5, 3.0, 0.75))
    assert plane_spacing(affine, 0) == pytest.approx((0.75, 3.0, 0.5))


def slices_of(voxels: np.ndarray, affine: np.ndarray | None = None, **config: object) -> VolumeSlices:
    affine = np.eye(4) if affine is None else affine
    side = max(voxels.shape[:3])
    return VolumeSlices(Volume(voxels, affine), VolumeConfig.model_validate(config), PLAIN, side)


def test_neighbours_are_the_channels_and_ends_repeat() -> None:
    voxels = np.broadcast_to(np.array([10, 20, 30, 40], np.uint8), (4, 4, 4))
    slices = slices_of(voxels, channels=3)
    found = [slices.image(index)[:, 0, 0].tolist() for index in range(len(slices))]
    assert found == [[10, 10, 20], [10, 20, 30], [20, 30, 40], [30, 40, 40]]


def test_one_channel_is_repeated() -> None:
    voxels = np.broadcast_to(np.array([10, 20], np.uint8), (2, 2, 2))
    assert slices_of(voxels).image(1)[:, 0, 0].tolist() == [20, 20, 20]


@pytest.mark.parametrize(
    ("names", "channels"), [([2], [30, 30, 30]), ([0, 2], [10, 30, 30]), ([3, 0, 1], [40, 10, 20])]
)
def test_modalities_become_channels_in_the_order_named(names: list[int], channels: list[int]) -> None:
    voxels = np.broadcast_to(np.array([10, 20, 30, 40], np.uint8), (2, 2, 2, 4))
    assert slices_of(voxels, modalities=names).image(0)[:, 0, 0].tolist() == channels


def test_modalities_have_to_be_named_and_there() -> None:
    voxels = np.zeros((2, 2, 2, 4), np.uint8)
    with pytest.raises(BrokenSampleError, match=r"has 4 modalities; name one to three"):
        slices_of(voxels)
    with pytest.raises(BrokenSampleError, match=r"has 4 modalities.*names 4"):
        slices_of(voxels, modalities=[4])
    assert len(slices_of(voxels[..., 0], modalities=[0])) == 2


def test_intensities_are_scaled_over_the_volume_and_by_modality() -> None:
    ramp = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    volume = Volume(np.stack([ramp, 100 * ramp - 7], axis=-1), np.eye(4))
    slices = VolumeSlices(volume, VolumeConfig(modalities=[0, 1]), NormaliseConfig(method="minmax"), 4)
    images = np.stack([slices.image(index) for index in range(4)])
    expected = np.rint(cut(ramp, np.eye(4), 2) / 63 * 255)
    for channel in range(3):
        np.testing.assert_array_equal(images[:, channel], expected)


def test_a_constant_volume_is_black_and_says_so() -> None:
    slices = VolumeSlices(Volume(np.full((2, 2, 2), 7.0), np.eye(4)), VolumeConfig(), NormaliseConfig(), 2)
    assert not slices.image(0).any()
    assert slices.warnings == ["constant image: all zero after normalisation"]


def test_a_slice_of_oblong_voxels_keeps_the_aspect_of_what_it_shows() -> None:
    # Sixteen slices of 4 mm: seen from the front as high as it is wide.
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    slices = slices_of(np.zeros((64, 8, 16), np.uint8), affine, axis=1)
    assert (slices.size, slices.spacing) == ((16, 64), (1.0, 4.0, 1.0))
    assert slices.image(0).shape == (3, 64, 64)
    assert slices.masks(np.zeros((64, 8, 16), np.uint8))[0].shape == (64, 64)


def test_masks_are_cut_as_images_are() -> None:
    affine = affine_of(EVERY_ORIENTATION[29])
    labels = np.random.default_rng(0).integers(0, 3, (6, 6, 6), np.uint8)
    slices = slices_of(labels, affine, axis=1)
    for index, mask in enumerate(slices.masks(labels)):
        np.testing.assert_array_equal(slices.image(index)[0], mask)
    np.testing.assert_array_equal(slices.restack(slices.masks(labels)), labels)


FOREGROUND = [False, True, False, False, True, False, False, False, False, False]


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_foreground_stays_and_a_larger_share_contains_a_smaller_one(one: float, other: float, seed: int) -> None:
    less, more = (choose_slices(FOREGROUND, share, seed, "site", "images/a.nii") for share in sorted((one, other)))
    assert {1, 4} <= set(less) <= set(more)
    assert less == sorted(less)
    assert len(less) == 2 + round(min(one, other) * 8)


def test_empty_slices_differ_between_volumes_and_seeds_and_are_drawn_again_alike() -> None:
    def drawn(seed: int, image: str) -> list[int]:
        return choose_slices([False] * 100, 0.2, seed, "site", image)

    assert drawn(0, "a") == drawn(0, "a")
    assert len({tuple(drawn(seed, image)) for seed, image in [(0, "a"), (0, "b"), (1, "a")]}) == 3


def test_a_volume_without_foreground_keeps_a_slice() -> None:
    assert len(choose_slices([False] * 5, 0.0, 0, "site", "a")) == 1
    assert choose_slices([False, True], 0.0, 0, "site", "a") == [1]
