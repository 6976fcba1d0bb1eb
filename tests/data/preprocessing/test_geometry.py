"""Resizing keeps proportions and labels; normalising keeps colour balance and uses the whole range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsca_pipeline.config import NormaliseConfig
from fedsca_pipeline.data.preprocessing.geometry import (
    Channels,
    fit_image,
    fit_mask,
    fitted_size,
    normalise,
    normalise_and_fit,
)

SIDES = st.integers(1, 40)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([16, 64, 256]))
def test_the_longer_side_fills_the_square_and_the_ratio_is_kept(height: int, width: int, side: int) -> None:
    tall, wide = fitted_size(height, width, side)

    assert max(tall, wide) == side
    assert abs(min(tall, wide) - max(1, side * min(height, width) / max(height, width))) <= 0.5


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 2**16))
def test_a_resized_mask_holds_no_label_that_was_not_there(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice(np.array([0, 1, 7], np.uint8), (height, width))

    assert set(np.unique(fit_mask(mask, 32))) <= set(np.unique(mask))


def test_nothing_is_resampled_where_the_size_is_right() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (32, 20, 3)).astype(np.float32), rng.integers(0, 3, (32, 20), dtype=np.uint8)

    np.testing.assert_array_equal(fit_image(image, 32), np.moveaxis(image, -1, 0))
    np.testing.assert_array_equal(fit_mask(mask, 32), mask)


def test_shrinking_averages_instead_of_skipping() -> None:
    stripes = np.tile(np.array([0.0, 255.0], np.float32), (64, 32))

    assert abs(fit_image(stripes, 16).astype(int) - 128).max() <= 16


def test_image_and_mask_stay_in_register() -> None:
    mask = np.zeros((300, 200), np.uint8)
    mask[60:180, 50:120] = 1

    seen = fit_image(mask.astype(np.float32) * 255, 64)[0] > 127

    assert (seen != fit_mask(mask, 64).astype(bool)).mean() < 0.02


def test_percentiles_are_joint_over_channels_so_colours_keep_their_balance() -> None:
    image = np.stack([np.linspace(0, 100, 400), np.linspace(0, 50, 400), np.zeros(400)], -1).reshape(20, 20, 3)

    levels, warnings = normalise(image, NormaliseConfig(lower=0, upper=100))

    np.testing.assert_allclose(levels.max(axis=(0, 1)), [255, 127.5, 0], atol=1e-3)
    assert warnings == []


def test_sixteen_bit_images_keep_their_fine_steps() -> None:
    ramp = (20_000 + np.arange(1024)).astype(np.uint16).reshape(32, 32)

    levels, _ = normalise(ramp, NormaliseConfig())

    assert len(np.unique(levels)) > 900
    assert (levels.min(), levels.max()) == (0, 255)


def test_a_constant_image_becomes_zero_with_a_warning() -> None:
    levels, warnings = normalise(np.full((4, 5), 77, np.uint8), NormaliseConfig())

    assert not levels.any()
    assert "constant" in warnings[0]


def test_few_bright_pixels_on_black_survive_coinciding_percentiles() -> None:
    image = np.zeros((100, 100), np.uint16)
    image[:4, :4] = 900

    levels, warnings = normalise(image, NormaliseConfig())

    assert (levels[:4, :4] == 255).all()
    assert "coincide" in warnings[0]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NormaliseConfig(method="minmax"), [0, 85, 170, 255]),
        (NormaliseConfig(method="window", window_centre=15, window_width=10), [0, 0, 255, 255]),
        (NormaliseConfig(method="none"), [0, 10, 20, 30]),
    ],
)
def test_each_method_maps_to_its_range(config: NormaliseConfig, expected: list[float]) -> None:
    levels, _ = normalise(np.array([[0, 10, 20, 30]], np.int16), config)

    np.testing.assert_allclose(levels[0], expected, atol=1e-3)


def test_unnormalised_values_beyond_a_byte_are_clipped_with_a_warning() -> None:
    levels, warnings = normalise(np.array([[-5, 4000]], np.int16), NormaliseConfig(method="none"))

    np.testing.assert_array_equal(levels, [[0, 255]])
    assert "clipped" in warnings[0]


@settings(deadline=None)
@given(
    image=hnp.arrays(np.uint8, st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.just(3)))),
    at=st.lists(st.floats(0, 100), min_size=1, max_size=4),
)
def test_percentiles_of_counted_bytes_are_numpy_s_to_the_last_bit(image: np.ndarray, at: list[float]) -> None:
    counts = Channels.of(image).counts

    assert counts.percentiles(at) == np.percentile(image, at).tolist()
    assert (counts.min(), counts.max()) == (image.min(), image.max())


@pytest.mark.parametrize("method", ["percentile", "minmax", "window", "none"])
@settings(deadline=None)
@given(
    shape=st.one_of(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES, st.just(3))),
    kind=st.sampled_from(["any", "grey", "constant", "dark"]),
    planar=st.booleans(),
    side=st.sampled_from([16, 32]),
    seed=st.integers(0, 2**16),
)
def test_bytes_by_tables_become_the_same_bits_as_by_arithmetic(
    method: str, shape: tuple[int, ...], kind: str, planar: bool, side: int, seed: int
) -> None:
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if kind == "grey" and len(shape) == 3:
        image[...] = image[..., :1]
    elif kind == "constant":
        image[...] = seed % 256
    elif kind == "dark":
        image //= 80
    if planar and len(shape) == 3:
        image = np.moveaxis(np.ascontiguousarray(np.moveaxis(image, -1, 0)), 0, -1)
    config = NormaliseConfig(method=method, window_centre=90, window_width=77)
    levels, warnings = normalise(image, config)

    fitted, told = normalise_and_fit(Channels.of(image), config, side)

    assert told == warnings
    assert fitted.dtype == np.uint8
    np.testing.assert_array_equal(fitted, fit_image(levels, side))


def test_deeper_images_go_the_way_of_arithmetic() -> None:
    image = np.random.default_rng(0).integers(0, 4000, (20, 30, 3), dtype=np.uint16)
    levels, _ = normalise(image, NormaliseConfig())

    fitted, _ = normalise_and_fit(Channels.of(image), NormaliseConfig(), 16)

    np.testing.assert_array_equal(fitted, fit_image(levels, 16))
