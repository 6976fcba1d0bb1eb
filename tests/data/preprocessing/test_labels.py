"""A mask means the same whichever way its classes are written: numbers, palette, colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fedsca_pipeline.data.preprocessing.labels import (
    by_colour,
    by_number,
    by_threshold,
    look_up,
    packed,
    read_classes,
    read_volume_classes,
)
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.data.site_folder.label_rule import LabelRule, colour_of, number_of

CLASSES = 3
RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"
masks = hnp.arrays(np.uint8, (5, 7), elements=st.integers(0, CLASSES))
palettes = st.lists(st.integers(1, 0xFFFFFF), min_size=CLASSES, max_size=CLASSES, unique=True)


def painted(mask: np.ndarray, colours: list[int]) -> np.ndarray:
    """The mask as an RGB picture, black where it is 0."""
    return np.array([list(number.to_bytes(3, "big")) for number in (0, *colours)], np.uint8)[mask]


@settings(max_examples=50)
@given(mask=masks, colours=palettes)
def test_a_mask_painted_in_any_colours_comes_back(mask: np.ndarray, colours: list[int]) -> None:
    named = {colour_of(number): label for label, number in enumerate(colours, start=1)}

    found, applied = by_colour(painted(mask, colours), named, CLASSES)

    assert found.dtype == np.uint8
    assert np.array_equal(found, mask)
    assert applied == named


@settings(max_examples=25)
@given(mask=masks, colours=palettes)
def test_rgb_palette_and_grey_files_of_one_mask_are_the_same(tmp_path_factory, mask, colours) -> None:
    folder = tmp_path_factory.mktemp("masks")
    picture = painted(mask, colours)
    Image.fromarray(picture).save(folder / "rgb.png")
    Image.fromarray(picture).save(folder / "rgb.tif")
    Image.fromarray(picture).save(folder / "rgb.bmp")
    indexed = Image.fromarray(mask).convert("P")
    indexed.putpalette([channel for number in (0, *colours) for channel in number.to_bytes(3, "big")])
    for name in ("palette.png", "palette.tif", "palette.bmp", "palette.gif"):
        indexed.save(folder / name)
    Image.fromarray(mask).save(folder / "grey.png")
    by_colours = LabelRule(colours={colour_of(number): label for label, number in enumerate(colours, start=1)})

    for name in ("rgb.png", "rgb.tif", "rgb.bmp", "palette.png", "palette.tif", "palette.bmp", "palette.gif"):
        assert np.array_equal(read_classes(folder / name, by_colours, CLASSES)[0], mask), name
    for name in ("palette.png", "palette.tif", "palette.bmp", "grey.png"):
        assert np.array_equal(read_classes(folder / name, LabelRule(), CLASSES)[0], mask), name


@given(number=st.integers(0, 0xFFFFFF))
def test_a_colour_is_written_and_read(number: int) -> None:
    assert number_of(colour_of(number)) == number
    assert number_of(colour_of(number).upper()) == number
    assert packed(np.array([[list(number.to_bytes(3, "big"))]], np.uint8)).tolist() == [[number]]


@pytest.mark.parametrize("text", ["red", "#f00", "ff0000", "#ff00000", "#gg0000", "#ff0000 "])
def test_what_is_no_colour_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="#rrggbb"):
        number_of(text)


def test_numbers_that_are_not_named_stay_and_the_map_is_told() -> None:
    mask, applied = by_number(np.array([[0, 1, 85]]), {85: 3}, CLASSES)

    assert mask.tolist() == [[0, 1, 3]]
    assert applied == {"85": 3}


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_numbers_of_16_bit_are_mapped(tmp_path: Path, name: str) -> None:
    Image.fromarray(np.array([[0, 300, 40_000]], np.uint16)).save(tmp_path / name)

    assert read_classes(tmp_path / name, LabelRule(numbers={300: 1, 40_000: 3}), CLASSES)[0].tolist() == [[0, 1, 3]]


def test_255_beside_nothing_but_0_is_class_1() -> None:
    assert by_number(np.array([[0, 255]]), {}, 1)[0].tolist() == [[0, 1]]
    assert by_number(np.array([[0, 0]]), {}, 1)[1] == {}
    with pytest.raises(BrokenSampleError, match="unknown label value 255"):
        by_number(np.array([[0, 1, 255]]), {}, 1)


def test_a_class_beyond_the_last_is_unknown() -> None:
    with pytest.raises(BrokenSampleError, match=r"unknown label value 7 \(classes are 0\.\.3\)"):
        by_number(np.array([[7]]), {7: 4}, CLASSES)
    with pytest.raises(BrokenSampleError, match=f"unknown label colour {RED}"):
        by_colour(painted(np.array([[1]]), [0xFF0000]), {RED: 4}, CLASSES)


def test_unknown_colours_are_named_with_the_cure_the_most_frequent_first() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[0], picture[1, :2] = (0, 0, 255), (0, 255, 0)

    with pytest.raises(BrokenSampleError) as caught:
        by_colour(picture, {RED: 1}, CLASSES)

    assert f"{BLUE}, {GREEN} (classes are 0..3)" in caught.value.reason
    assert f"'{BLUE}': <class>" in caught.value.cure
    assert "site.yml" in caught.value.cure


def test_of_many_unknown_colours_only_some_are_shown() -> None:
    picture = np.zeros((20, 1, 3), np.uint8)
    picture[:, 0, 0] = range(1, 21)

    with pytest.raises(BrokenSampleError, match="and 12 more"):
        by_colour(picture, {RED: 1}, CLASSES)


def test_black_is_background_unless_it_is_named() -> None:
    black = np.zeros((1, 1, 3), np.uint8)

    assert by_colour(black, {RED: 1}, CLASSES)[0].tolist() == [[0]]
    assert by_colour(black, {"#000000": 2}, CLASSES)[0].tolist() == [[2]]


def test_with_both_kinds_of_keys_colours_are_for_colour_files_and_numbers_for_grey_ones(tmp_path: Path) -> None:
    rule = LabelRule(numbers={85: 2}, colours={RED: 1})
    Image.fromarray(np.array([[85, 0]], np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[[255, 0, 0], [0, 0, 0]]], np.uint8)).save(tmp_path / "rgb.png")

    assert read_classes(tmp_path / "grey.png", rule, CLASSES)[0].tolist() == [[2, 0]]
    assert read_classes(tmp_path / "rgb.png", rule, CLASSES)[0].tolist() == [[1, 0]]


def test_a_grey_file_is_read_by_colour_where_there_are_only_colours(tmp_path: Path) -> None:
    Image.fromarray(np.array([[255, 0]], np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")

    for name in ("grey.png", "bit.png"):
        assert read_classes(tmp_path / name, LabelRule(colours={"#ffffff": 2}), CLASSES)[0].tolist() == [[2, 0]]


def test_a_jpeg_mask_is_refused_with_or_without_colours_and_read_only_by_a_threshold(tmp_path: Path) -> None:
    truth = np.zeros((16, 16), np.uint8)
    truth[4:12, 4:12] = 1
    Image.fromarray(truth * 255).save(tmp_path / "mask.jpg", quality=60)

    for rule in (LabelRule(), LabelRule(colours={RED: 1})):
        with pytest.raises(BrokenSampleError, match="mask_threshold"):
            read_classes(tmp_path / "mask.jpg", rule, CLASSES)
    mask, applied = read_classes(tmp_path / "mask.jpg", LabelRule(threshold=128), CLASSES)
    assert np.array_equal(mask, truth)
    assert applied == {">=128": 1}


def test_a_threshold_is_on_the_mean_of_the_channels() -> None:
    assert by_threshold(np.array([[[255, 255, 0], [255, 0, 0]]], np.uint8), 128)[0].tolist() == [[1, 0]]


def test_colours_of_16_bit_are_refused() -> None:
    with pytest.raises(BrokenSampleError, match="8 bit a channel"):
        by_colour(np.zeros((2, 2, 3), np.uint16), {RED: 1}, CLASSES)


def test_looking_up_keeps_the_shape_and_names_what_is_unknown() -> None:
    mask, unknown = look_up(np.array([[[5, 6], [6, 7]]]), {5: 1, 7: 2})

    assert mask.tolist() == [[[1, 0], [0, 2]]]
    assert unknown == [6]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("low", [0.0, 0.0001, 0.4999])
def test_a_threshold_reads_a_volume_mask_of_fractions(tmp_path: Path, suffix: str, low: float) -> None:
    truth = np.arange(24).reshape(2, 3, 4) % 2
    path, image = tmp_path / f"m{suffix}", Volume(np.zeros((2, 3, 4), np.int16), np.eye(4))
    write_nifti(path, np.where(truth, 0.9999, low).astype(np.float32), np.eye(4))

    mask, applied = read_volume_classes(path, image, LabelRule(threshold=0.5), 1)

    np.testing.assert_array_equal(mask, truth)
    assert mask.dtype == np.uint8
    assert applied == {">=0.5": 1}


def test_a_threshold_does_not_read_a_volume_mask_with_nan(tmp_path: Path) -> None:
    write_nifti(tmp_path / "m.nii", np.full((2, 3, 4), np.nan, np.float32), np.eye(4))

    with pytest.raises(BrokenSampleError, match="NaN or infinite"):
        read_volume_classes(tmp_path / "m.nii", Volume(np.zeros((2, 3, 4)), np.eye(4)), LabelRule(threshold=0.5), 1)


def test_fractions_without_a_threshold_are_refused_with_the_cure(tmp_path: Path) -> None:
    write_nifti(tmp_path / "m.nii", np.full((2, 3, 4), 0.9999, np.float32), np.eye(4))

    with pytest.raises(BrokenSampleError, match="set mask_threshold in the site's site"):
        read_volume_classes(tmp_path / "m.nii", Volume(np.zeros((2, 3, 4)), np.eye(4)), LabelRule(), 1)


@pytest.mark.parametrize("rule", [LabelRule(), LabelRule(threshold=128.0), LabelRule(colours={"#ffffff": 1})])
def test_no_rule_reads_a_mask_with_its_label_in_the_alpha_channel(tmp_path: Path, rule: LabelRule) -> None:
    alpha = Image.fromarray(np.array([[0, 255]], np.uint8))
    Image.merge("LA", [Image.new("L", (2, 1), 255), alpha]).save(tmp_path / "m.png")

    with pytest.raises(BrokenSampleError, match="the label is in the alpha channel"):
        read_classes(tmp_path / "m.png", rule, 1)
