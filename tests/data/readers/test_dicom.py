"""DICOM: the right values at the right place, whatever the encoding; what cannot be read says why and nothing more."""

from __future__ import annotations

import logging
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import io_orientation, ornt_transform
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.dicom import (
    read_frame,
    read_frame_segmentation,
    read_header,
    read_multiframe,
    read_segmentation,
    read_series,
)
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.readers.volumes import read_volume, read_volume_mask

AFFINE = np.array([[-0.5, 0.0, 0.0, 20.0], [0.0, -0.75, 0.0, 30.0], [0.0, 0.0, 3.0, -40.0], [0.0, 0.0, 0.0, 1.0]])
STORED = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4) * 7 - 300
GREY = np.random.default_rng(0).integers(0, 4096, (40, 36)).astype(np.uint16)


def reason(read: Any, *arguments: Any) -> str:
    with pytest.raises(BrokenSampleError) as caught:
        read(*arguments)
    assert caught.value.cure
    return caught.value.reason


def test_a_frame_without_rescale_keeps_its_integers(tmp_path: Path, dicom_files: Any) -> None:
    pixels = read_frame(dicom_files.frame(tmp_path / "a.dcm", GREY))
    np.testing.assert_array_equal(pixels, GREY)
    assert pixels.dtype == np.uint16


def test_slope_and_intercept_are_applied(tmp_path: Path, dicom_files: Any) -> None:
    path = dicom_files.frame(tmp_path / "a.dcm", GREY, RescaleSlope=2, RescaleIntercept=-1024)
    np.testing.assert_array_equal(read_frame(path), GREY * 2.0 - 1024)


def test_monochrome1_is_inverted_over_what_its_bits_can_hold(tmp_path: Path, dicom_files: Any) -> None:
    white_is_low = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    np.testing.assert_array_equal(
        read_frame(dicom_files.frame(tmp_path / "a.dcm", GREY, **white_is_low)), 4095 - GREY.astype(int)
    )
    rescaled = dicom_files.frame(tmp_path / "b.dcm", GREY, RescaleSlope=0.5, RescaleIntercept=10, **white_is_low)
    np.testing.assert_allclose(read_frame(rescaled), 20 + 4095 / 2 - (GREY * 0.5 + 10))


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("colour", [False, True])
def test_lossless_compressions_give_the_very_pixels(
    tmp_path: Path, dicom_files: Any, syntax: str, colour: bool
) -> None:
    stored = np.random.default_rng(1).integers(0, 255, (40, 36, 3)).astype(np.uint8) if colour else GREY
    data = dicom_files.data_set(stored)
    data.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(read_frame(dicom_files.save(tmp_path / "a.dcm", data)), stored)


# Of pydicom's own test files, what their makers say of them: shape, number type, mean to a percent.
@pytest.mark.parametrize(
    ("name", "shape", "kind", "mean"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", (100, 100, 3), "uint8", 127.7),
        ("SC_rgb_jpeg_dcmtk.dcm", (100, 100, 3), "uint8", 127.73),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100, 3), "uint8", 127.73),
        ("JPGExtended.dcm", (1024, 256), "uint16", 14.38),
        ("JPEGLSNearLossless_16.dcm", (50, 10), "uint16", 12014.5),
        ("693_J2KI.dcm", (512, 512), "float32", -8.32 - 1024),
    ],
    ids=["jpeg lossless", "jpeg baseline ybr", "ybr 422", "jpeg 12 bit", "jpeg-ls lossy", "jpeg 2000 lossy"],
)
def test_files_of_other_makers_are_decoded(name: str, shape: tuple[int, ...], kind: str, mean: float) -> None:
    path = Path(get_testdata_file(name, download=False))
    pixels = read_frame(path)
    assert (pixels.shape, pixels.dtype) == (shape, kind)
    assert pixels.mean() == pytest.approx(mean, rel=0.01)


def test_the_same_colours_come_out_of_ybr_and_rgb() -> None:
    ybr, rgb = (read_frame(Path(get_testdata_file(n))) for n in ("SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_gdcm.dcm"))
    assert np.abs(ybr.astype(int) - rgb).max() <= 6


def test_a_palette_becomes_colours() -> None:
    path = Path(get_testdata_file("examples_palette.dcm"))
    data = dcmread(path)
    red = np.frombuffer(data.RedPaletteColorLookupTableData, "<u2")
    pixels = read_frame(path)
    assert pixels.shape == (*data.pixel_array.shape, 3)
    np.testing.assert_array_equal(pixels[..., 0], red[data.pixel_array])


def orientations() -> st.SearchStrategy[np.ndarray]:
    """Signed permutations with right or left hand, times spacings, and an origin."""

    def build(order: list[int], signs: list[int], spacing: list[float], origin: list[float]) -> np.ndarray:
        affine = np.eye(4)
        affine[:3, :3] = np.eye(3)[:, order] * signs * spacing
        affine[:3, 3] = origin
        return affine

    return st.builds(
        build,
        st.permutations([0, 1, 2]),
        st.lists(st.sampled_from([-1, 1]), min_size=3, max_size=3),
        st.lists(st.sampled_from([0.5, 0.8, 1.25, 3.0]), min_size=3, max_size=3),
        st.lists(st.integers(-200, 200).map(lambda tenths: tenths / 10), min_size=3, max_size=3),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affine=orientations(), order=st.permutations(range(STORED.shape[2])))
def test_every_voxel_is_where_it_was_scanned_whatever_the_plane_and_the_files_order(
    tmp_path_factory: pytest.TempPathFactory, dicom_files: Any, affine: np.ndarray, order: list[int]
) -> None:
    slices = dicom_files.slices(STORED, affine)
    volume = read_series(dicom_files.series(tmp_path_factory.mktemp("series"), [slices[index] for index in order]))

    # A voxel may have another index, but not another value at its place in the patient.
    for index in ((0, 0, 0), (5, 0, 1), (0, 4, 3), (3, 2, 2)):
        place = affine @ [*index, 1.0]
        found = np.linalg.inv(volume.affine) @ place
        np.testing.assert_allclose(found[:3], np.rint(found[:3]), atol=1e-4)
        assert volume.voxels[tuple(np.rint(found[:3]).astype(int))] == STORED[index]


@pytest.mark.parametrize("reversed_", [False, True])
def test_an_axial_series_is_read_by_column_row_and_slice(tmp_path: Path, dicom_files: Any, reversed_: bool) -> None:
    slices = dicom_files.slices(STORED, AFFINE, RescaleSlope=1, RescaleIntercept=-1024)
    volume = read_volume(dicom_files.series(tmp_path / "a", slices[::-1] if reversed_ else slices))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    np.testing.assert_array_equal(volume.voxels, STORED - 1024.0)
    assert volume.spacing == pytest.approx((0.5, 0.75, 3.0))


def test_a_slope_of_its_own_is_applied_to_each_slice(tmp_path: Path, dicom_files: Any) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    for index, data in enumerate(slices):
        data.RescaleSlope, data.RescaleIntercept = index + 1, 0
    volume = read_series(dicom_files.series(tmp_path / "a", slices))
    np.testing.assert_array_equal(volume.voxels, STORED * np.array([1.0, 2.0, 3.0, 4.0]))


def test_a_series_of_one_slice_is_as_thick_as_it_says(tmp_path: Path, dicom_files: Any) -> None:
    volume = read_series(dicom_files.series(tmp_path / "a", dicom_files.slices(STORED[..., :1], AFFINE)))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)


def test_a_volume_in_one_file_is_the_same_as_its_series(tmp_path: Path, dicom_files: Any) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    data = dicom_files.enhanced([slices[index] for index in (2, 0, 3, 1)])
    volume = read_volume(dicom_files.save(tmp_path / "a.dcm", data))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    np.testing.assert_array_equal(volume.voxels, STORED * 2.0 + 1)
    assert read_header(tmp_path / "a.dcm").frames == 4


def test_a_volume_is_read_under_the_name_that_its_owner_gave_it(tmp_path: Path, dicom_files: Any) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    folder = dicom_files.series(tmp_path / "1.2.840.7", slices)
    np.testing.assert_array_equal(read_volume(folder).voxels, STORED)
    one = dicom_files.save(tmp_path / "one.dcm", slices[1])
    np.testing.assert_array_equal(read_volume(one).voxels, STORED[..., 1:2])


def drop(slices: list[Any]) -> None:
    del slices[2]


def double(slices: list[Any]) -> None:
    slices[2].ImagePositionPatient = slices[1].ImagePositionPatient


def shift(slices: list[Any]) -> None:
    x, y, z = slices[2].ImagePositionPatient
    slices[2].ImagePositionPatient = [x, y, z + 0.3]


def tilt(slices: list[Any]) -> None:
    for index, data in enumerate(slices):
        x, y, z = data.ImagePositionPatient
        data.ImagePositionPatient = [x, y + index, z]


def turn(slices: list[Any]) -> None:
    slices[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]


def mix_series(slices: list[Any]) -> None:
    slices[0].SeriesInstanceUID = generate_uid()


def mix_patients(slices: list[Any]) -> None:
    slices[0].PatientID = "P2"


def crop(slices: list[Any]) -> None:
    slices[0].Rows = 4
    slices[0].PixelData = slices[0].PixelData[: 4 * 6 * 2]


def forget_positions(slices: list[Any]) -> None:
    for data in slices:
        del data.ImagePositionPatient


def colour(slices: list[Any]) -> None:
    for data in slices:
        data.PhotometricInterpretation, data.SamplesPerPixel, data.PlanarConfiguration = "RGB", 3, 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop, "slices are missing"),
        (double, "several slices at one position"),
        (shift, "unevenly spaced"),
        (tilt, "tilted gantry"),
        (turn, "several orientations"),
        (mix_series, "2 series"),
        (mix_patients, "2 patients"),
        (crop, "2 sizes"),
        (forget_positions, "no position"),
        (colour, "in colour"),
    ],
)
def test_what_is_no_even_stack_of_one_series_is_refused(
    tmp_path: Path, dicom_files: Any, spoil: Any, said: str
) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    spoil(slices)
    assert said in reason(read_series, dicom_files.series(tmp_path / "a", slices))


def test_a_film_is_no_volume_and_a_volume_no_frame(tmp_path: Path, dicom_files: Any) -> None:
    film = dicom_files.data_set(GREY[:8], SOPClassUID=SecondaryCaptureImageStorage, NumberOfFrames=2)
    film.PixelData = film.PixelData * 2
    path = dicom_files.save(tmp_path / "a.dcm", film)
    assert "film" in reason(read_multiframe, path)
    assert "several frames" in reason(read_frame, path)


def two_segments(count: int, *, overlap: bool = True) -> np.ndarray:
    """Two segments of [N, 5, 6] pixels, which may overlap in one pixel of slice 2; slices 0 and 3 are empty."""
    labels = np.zeros((count, 5, 6, 2), np.uint8)
    labels[1, 1:3, 2:6, 0] = 1
    labels[2, 0:4, 1:3, 1] = 1
    labels[2, 3, 2:5, 0] = overlap
    return labels


@pytest.mark.parametrize("shuffled", [False, True])
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affine=orientations())
def test_a_segmentation_lies_where_it_was_drawn_and_the_higher_segment_wins(
    tmp_path_factory: pytest.TempPathFactory, dicom_files: Any, shuffled: bool, affine: np.ndarray
) -> None:
    folder = tmp_path_factory.mktemp("seg")
    slices = dicom_files.slices(STORED, affine)
    labels = two_segments(4)
    path = dicom_files.segmentation(folder / "m.seg", slices, labels)
    image = read_series(dicom_files.series(folder / "a", slices[::-1] if shuffled else slices))

    mask = read_segmentation(path, image).voxels

    wanted = np.where(labels[..., 1] > 0, 2, labels[..., 0])
    back = np.linalg.inv(image.affine) @ affine
    for place in np.ndindex(STORED.shape):
        index = np.rint(back @ [*place, 1.0])[:3].astype(int)
        assert mask[tuple(index)] == wanted[place[2], place[1], place[0]]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(affine=orientations(), other=orientations())
def test_a_nifti_mask_of_a_series_is_laid_on_it_however_a_converter_turned_its_axes(
    tmp_path_factory: pytest.TempPathFactory, dicom_files: Any, affine: np.ndarray, other: np.ndarray
) -> None:
    folder = tmp_path_factory.mktemp("nifti")
    image = read_series(dicom_files.series(folder / "a", dicom_files.slices(STORED, affine)))
    turn = ornt_transform(io_orientation(image.affine), io_orientation(other))
    nibabel.save(nibabel.Nifti1Image(image.voxels, image.affine).as_reoriented(turn), folder / "m.nii.gz")
    np.testing.assert_array_equal(read_volume_mask(folder / "m.nii.gz", image), image.voxels)


def test_a_label_map_segmentation_is_read_too(tmp_path: Path, dicom_files: Any) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    labels = two_segments(4, overlap=False)
    path = dicom_files.segmentation(tmp_path / "m.seg", slices, labels, kind="LABELMAP")
    image = read_series(dicom_files.series(tmp_path / "a", slices))
    np.testing.assert_array_equal(
        read_segmentation(path, image).voxels, (labels[..., 0] + 2 * labels[..., 1]).transpose(2, 1, 0)
    )


def test_a_segmentation_of_another_image_is_refused(tmp_path: Path, dicom_files: Any) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    path = dicom_files.segmentation(tmp_path / "m.seg", slices, two_segments(4))
    image = read_series(dicom_files.series(tmp_path / "a", slices))

    elsewhere = Volume(image.voxels, image.affine, generate_uid())
    assert "another frame of reference" in reason(read_segmentation, path, elsewhere)
    moved = image.affine.copy()
    moved[0, 3] += 0.2
    assert "grid" in reason(read_segmentation, path, Volume(image.voxels, moved))
    assert "grid" in reason(read_segmentation, path, Volume(image.voxels[:, :, :2], image.affine))
    assert "no segmentation" in reason(read_segmentation, tmp_path / "a" / "0000.dcm", image)
    fractional = dicom_files.segmentation(
        tmp_path / "f.seg", slices, two_segments(4).astype(np.float64) * 0.5, kind="FRACTIONAL"
    )
    assert "fractional" in reason(read_segmentation, fractional, image)


def test_the_segmentation_of_one_slice_or_of_its_whole_series_is_laid_on_a_frame(
    tmp_path: Path, dicom_files: Any
) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    labels = two_segments(4)
    image = dicom_files.save(tmp_path / "a.dcm", slices[2])
    wanted = np.where(labels[2, ..., 1] > 0, 2, labels[2, ..., 0])
    for path in (
        dicom_files.segmentation(tmp_path / "all.dcm", slices, labels),
        dicom_files.segmentation(tmp_path / "one.dcm", slices[2:3], labels[2:3]),
    ):
        np.testing.assert_array_equal(read_frame_segmentation(path, image), wanted)
    other = dicom_files.frame(tmp_path / "b.dcm", GREY)
    assert "another frame of reference" in reason(read_frame_segmentation, tmp_path / "one.dcm", other)


def test_annotations_burned_into_the_pixels_are_refused(tmp_path: Path, dicom_files: Any) -> None:
    assert "burned" in reason(read_frame, dicom_files.frame(tmp_path / "a.dcm", GREY, BurnedInAnnotation="YES"))
    read_frame(dicom_files.frame(tmp_path / "b.dcm", GREY, BurnedInAnnotation="NO"))


def test_a_file_without_an_image_is_broken(dicom_files: Any) -> None:
    assert "no image" in reason(read_frame, Path(get_testdata_file("rtplan.dcm")))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_file_is_broken(tmp_path: Path, dicom_files: Any, compressed: bool) -> None:
    data = dicom_files.data_set(GREY)
    if compressed:
        data.compress(JPEG2000Lossless)
    path = dicom_files.save(tmp_path / "a.dcm", data)
    whole = path.read_bytes()
    for kept in (0, 100, 200, len(whole) // 2, len(whole) - 60):
        path.write_bytes(whole[:kept])
        reason(read_frame, path)


def test_absurd_sizes_are_refused_before_anything_is_made_for_them(tmp_path: Path, dicom_files: Any) -> None:
    small = dicom_files.data_set(GREY)
    small.Rows = small.Columns = 65535
    assert "promises more" in reason(read_frame, dicom_files.save(tmp_path / "a.dcm", small))
    # The compressed stream says another size than the header: 40,000 x 40,000.
    for syntax, mark, place, form in (
        (JPEG2000Lossless, b"\xff\x4f\xff\x51", 8, ">2I"),
        (JPEGLSLossless, b"\xff\xf7", 5, ">2H"),
    ):
        data = dicom_files.data_set(GREY)
        data.compress(syntax)
        path = dicom_files.save(tmp_path / "b.dcm", data)
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, content.index(mark) + place, 40_000, 40_000)
        path.write_bytes(content)
        assert "40000 x 40000" in reason(read_frame, path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_damage_anywhere_gives_an_image_or_a_broken_sample_and_tells_no_value(
    tmp_path_factory: pytest.TempPathFactory,
    dicom_files: Any,
    caplog: pytest.LogCaptureFixture,
    syntax: str | None,
    changes: list[tuple[float, int]],
) -> None:
    data = dicom_files.data_set(GREY, PatientName="Zweistein^Q", PatientID="ZW-4711", StudyDate="19020304")
    if syntax:
        data.compress(syntax)
    path = dicom_files.save(tmp_path_factory.mktemp("damage") / "a.dcm", data)
    content = bytearray(path.read_bytes())
    for where, value in changes:
        content[132 + int(where * (len(content) - 132))] = value
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        try:
            read_frame(path)
        except BrokenSampleError as error:
            said = str(error)
        else:
            said = ""
    assert not warned
    assert not any(word in said + caplog.text for word in ("Zweistein", "4711", "1902"))


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "frames"])
def test_damage_to_segmentations_and_multi_frame_files_never_raises_anything_but_a_broken_sample(
    tmp_path: Path, dicom_files: Any, kind: str
) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    image = read_series(dicom_files.series(tmp_path / "a", slices))
    path = tmp_path / "b.dcm"
    if kind == "frames":
        dicom_files.save(path, dicom_files.enhanced(slices))
    else:
        dicom_files.segmentation(path, slices, two_segments(4, overlap=False), kind=kind)
    whole = path.read_bytes()
    broken = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        content = bytearray(whole)
        for place in rng.integers(132, len(content), rng.integers(1, 6)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            read_multiframe(path) if kind == "frames" else read_segmentation(path, image)
        except BrokenSampleError:
            broken += 1
    assert broken


def test_warnings_and_log_of_pydicom_say_nothing(
    tmp_path: Path, dicom_files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    data = dicom_files.data_set(GREY, FrameOfReferenceUID="1.2.3.4711")
    path = dicom_files.save(tmp_path / "a" / "a.dcm", data)
    # A value that its representation does not allow, of which pydicom warns with the value.
    path.write_bytes(path.read_bytes().replace(b"1.2.3.4711", b"ZWEISTEIN1"))
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        assert dcmread(path).FrameOfReferenceUID
        assert "ZWEISTEIN1" in str(warned[0].message)
        warned.clear()
        caplog.clear()
        read_series(path.parent)
        read_frame(path)
        read_header(path)
    assert not warned
    assert not caplog.text


def test_nothing_is_said_while_several_threads_read_and_warnings_come_back_after_them(
    tmp_path: Path, dicom_files: Any
) -> None:
    paths = [
        dicom_files.frame(tmp_path / f"{index}.dcm", GREY, FrameOfReferenceUID="1.2.3.4711") for index in range(24)
    ]
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"1.2.3.4711", b"ZWEISTEIN1"))
    with warnings.catch_warnings(record=True) as warned, ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("always")
        frames = list(threads.map(lambda path: read_multiframe(path).frame_of_reference, paths))
        assert frames == ["ZWEISTEIN1"] * 24
        assert not warned
        warnings.warn("heard", stacklevel=1)
        assert len(warned) == 1


@pytest.mark.parametrize("litter", ["DICOMDIR", "dicomdir", "Thumbs.db", "desktop.ini"])
def test_litter_among_slices_is_no_slice(tmp_path: Path, dicom_files: Any, litter: str) -> None:
    folder = dicom_files.series(tmp_path / "a", dicom_files.slices(STORED, AFFINE))
    (folder / litter).write_bytes(b"no image")

    assert read_series(folder).shape == STORED.shape


def test_another_file_among_slices_is_said_to_be_no_dicom(tmp_path: Path, dicom_files: Any) -> None:
    folder = dicom_files.series(tmp_path / "a", dicom_files.slices(STORED, AFFINE))
    (folder / "notes.txt").write_bytes(b"the patient Zweistein" * 20)

    with pytest.raises(BrokenSampleError, match="file 5 of the folder, by name: is no DICOM file; take it out"):
        read_series(folder)


def test_a_dicomdir_under_another_name_is_told(tmp_path: Path, dicom_files: Any) -> None:
    data = dicom_files.data_set(GREY, SOPClassUID="1.2.840.10008.1.3.10")
    folder = dicom_files.series(tmp_path / "a", dicom_files.slices(STORED, AFFINE))

    assert "a DICOMDIR, the table of contents" in reason(read_frame, dicom_files.save(tmp_path / "0.dcm", data))
    dicom_files.save(folder / "1.dcm", data)
    assert "a DICOMDIR, the table of contents" in reason(read_series, folder)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_segmentation_without_a_frame_of_reference_is_told(tmp_path: Path, dicom_files: Any, kind: str) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    path = dicom_files.segmentation(tmp_path / "m.seg", slices, two_segments(4, overlap=False), kind=kind)
    image = read_series(dicom_files.series(tmp_path / "a", slices))
    data = dcmread(path)
    del data.FrameOfReferenceUID
    data.save_as(path)

    with pytest.raises(BrokenSampleError, match=r"has no frame of reference.*FrameOfReferenceUID"):
        read_segmentation(path, image)


def test_slices_and_frames_without_a_frame_of_reference_are_told(tmp_path: Path, dicom_files: Any) -> None:
    slices = dicom_files.slices(STORED, AFFINE)
    enhanced = dicom_files.enhanced(slices)
    for data in (enhanced, *slices):
        del data.FrameOfReferenceUID
    dicom_files.save(tmp_path / "e.dcm", enhanced)

    assert "has no frame of reference" in reason(read_multiframe, tmp_path / "e.dcm")
    assert "has no frame of reference" in reason(read_series, dicom_files.series(tmp_path / "a", slices))
