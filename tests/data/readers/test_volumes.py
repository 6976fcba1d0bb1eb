"""Volumes: every format gives the same voxels and geometry; what cannot be one says why."""

from __future__ import annotations

import contextlib
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsca_pipeline.data.importers.pictures import read_nifti
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.data.readers.volumes import VOLUME_READERS, read_volume, read_volume_mask
from fedsca_pipeline.data.site_folder.discovery import VOLUME_SUFFIXES, may_hold_volumes

AFFINE = np.array([[-0.5, 0.0, 0.0, 20.0], [0.0, 0.75, 0.0, -30.0], [0.0, 0.0, 3.0, 40.0], [0.0, 0.0, 0.0, 1.0]])
VOXELS = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6) - 60
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nrrd(path: Path, voxels: np.ndarray, affine: np.ndarray, **header: object) -> Path:
    directions = np.full((voxels.ndim, 3), np.nan)
    directions[:3] = (LPS @ affine)[:3, :3].T
    space = {"space": "left-posterior-superior", "space directions": directions, "space origin": (LPS @ affine)[:3, 3]}
    nrrd.write(str(path), voxels, space | header)
    return path


def write_mha(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    import SimpleITK

    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, str(path), useCompression=True)
    return path


def write_nii(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


WRITERS = {".nii": write_nii, ".nii.gz": write_nii, ".nrrd": write_nrrd, ".mha": write_mha}


@pytest.fixture(params=WRITERS)
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def reason(path: Path) -> str:
    with pytest.raises(BrokenSampleError) as caught:
        read_volume(path)
    assert caught.value.cure
    return caught.value.reason


def test_every_format_gives_the_same_voxels_and_geometry(tmp_path: Path, suffix: str) -> None:
    volume = read_volume(WRITERS[suffix](tmp_path / f"a{suffix}", VOXELS, AFFINE))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    assert volume.shape == (4, 5, 6)
    assert volume.spacing == pytest.approx((0.5, 0.75, 3.0))


def test_a_mask_on_its_images_grid_is_read_as_whole_numbers(tmp_path: Path, suffix: str) -> None:
    labels = (VOXELS % 3).astype(np.float32)
    mask = read_volume_mask(WRITERS[suffix](tmp_path / f"m{suffix}", labels, AFFINE), Volume(VOXELS, AFFINE))
    np.testing.assert_array_equal(mask, labels)
    assert np.issubdtype(mask.dtype, np.integer)


def test_a_cut_file_of_any_format_is_broken(tmp_path: Path, suffix: str) -> None:
    path = WRITERS[suffix](tmp_path / f"a{suffix}", VOXELS, AFFINE)
    path.write_bytes(path.read_bytes()[:-40])
    assert "cannot be read" in reason(path)


def test_an_empty_and_an_alien_file_are_broken_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.touch()
    assert reason(path) == "the file is empty"
    path.write_bytes(b"something else\n" * 99)
    assert "cannot be read" in reason(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".nii", ".nrrd", ".mha"]))
def test_damaged_bytes_never_raise_anything_but_a_broken_sample(
    tmp_path: Path, data: st.DataObject, suffix: str
) -> None:
    path = WRITERS[suffix](tmp_path / f"a{suffix}", VOXELS, AFFINE)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(400, len(content)) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])

    with contextlib.suppress(BrokenSampleError):
        assert read_volume(path).voxels.ndim in (3, 4)


def test_sites_of_volumes_are_known_by_the_suffixes_that_are_read(tmp_path: Path) -> None:
    assert set(VOLUME_SUFFIXES) == set(VOLUME_READERS)
    assert not may_hold_volumes(tmp_path)
    for name, expected in {
        "a.png": False, ".hidden": False, "B.NII.GZ": True, "c.dcm": False, "IM0001": False, "d.mha": True,
    }.items():  # fmt: skip
        images = tmp_path / name / "images"
        images.mkdir(parents=True)
        assert not may_hold_volumes(tmp_path / name)
        (images / name).touch()
        assert may_hold_volumes(tmp_path / name) == expected, name


def test_nan_and_infinity_are_refused(tmp_path: Path, suffix: str) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = np.nan
    assert "NaN" in reason(WRITERS[suffix](tmp_path / f"a{suffix}", voxels, AFFINE))


def test_the_files_own_scaling_is_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.header.set_slope_inter(2.0, -1000.0)
    image.to_filename(tmp_path / "a.nii")
    raw = nibabel.load(tmp_path / "a.nii").dataobj.get_unscaled()
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").voxels, raw * 2.0 - 1000.0)


def test_modalities_are_the_last_axis_whatever_the_file_does(tmp_path: Path) -> None:
    both = np.stack([VOXELS, VOXELS + 1], axis=-1)
    directions = np.vstack([[np.nan] * 3, (LPS @ AFFINE)[:3, :3].T])
    files = [
        write_nii(tmp_path / "last.nii", both, AFFINE),
        write_nii(tmp_path / "vector.nii", both[:, :, :, None], AFFINE),
        write_nrrd(tmp_path / "last.nrrd", both, AFFINE),
        write_nrrd(tmp_path / "first.nrrd", np.moveaxis(both, -1, 0), AFFINE, **{"space directions": directions}),
    ]
    for file in files:
        volume = read_volume(file)
        np.testing.assert_array_equal(volume.voxels, both, err_msg=file.name)
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6, err_msg=file.name)


def test_a_flat_file_is_a_volume_of_one_slice(tmp_path: Path, suffix: str) -> None:
    assert read_volume(WRITERS[suffix](tmp_path / f"a{suffix}", VOXELS[:, :, :1], AFFINE)).shape == (4, 5, 1)
    assert read_volume(write_nii(tmp_path / "flat.nii", VOXELS[:, :, 0], AFFINE)).shape == (4, 5, 1)


@pytest.mark.parametrize(("space", "flips"), [("RAS", (1, 1, 1)), ("LAS", (-1, 1, 1)), ("LPS", (-1, -1, 1))])
def test_a_nrrd_in_any_patient_space_comes_to_ras(tmp_path: Path, space: str, flips: tuple[int, int, int]) -> None:
    names = {"RAS": "right-anterior-superior", "LAS": "left-anterior-superior", "LPS": "LPS"}
    own = np.diag([*flips, 1]) @ AFFINE
    header = {"space": names[space], "space directions": own[:3, :3].T, "space origin": own[:3, 3]}
    np.testing.assert_allclose(read_volume(write_nrrd(tmp_path / "a.nrrd", VOXELS, AFFINE, **header)).affine, AFFINE)


def test_a_nrrd_without_geometry_is_refused(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "a.nrrd"), VOXELS)
    assert "directions missing" in reason(tmp_path / "a.nrrd")


def test_units_other_than_mm_are_converted(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.header.set_xyzt_units("micron")
    image.to_filename(tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").spacing == pytest.approx((0.5e-3, 0.75e-3, 3e-3))


def test_a_header_that_promises_too_much_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(100))
    (tmp_path / "a.nrrd").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 30000 30000 30000\nencoding: raw\nendian: little\n\nxx"
    )
    (tmp_path / "a.mha").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 30000 30000 30000\nElementType = MET_SHORT\n"
        "ElementDataFile = LOCAL\nxx"
    )
    for name in ("a.nii", "a.nrrd", "a.mha"):
        assert "more than 33,554,432 of such a file" in reason(tmp_path / name)


def test_voxels_in_another_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(bytes(64))
    (tmp_path / "a.nrrd").write_text(
        "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: secret.raw\n\n"
    )
    (tmp_path / "a.mha").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = secret.raw\n"
    )
    for name in ("a.nrrd", "a.mha"):
        assert "in another file (secret.raw)" in reason(tmp_path / name)


def test_colours_and_five_axes_are_refused(tmp_path: Path) -> None:
    colours = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    assert "voxels of type" in reason(write_nii(tmp_path / "rgb.nii", colours, AFFINE))
    assert "5 axes" in reason(write_nii(tmp_path / "five.nii", np.zeros((2, 2, 2, 2, 2), np.int16), AFFINE))


def test_a_singular_affine_is_refused(tmp_path: Path) -> None:
    flat = AFFINE.copy()
    flat[:3, 2] = flat[:3, 1]
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.set_sform(flat, code=1)
    image.to_filename(tmp_path / "a.nii")
    assert "geometry" in reason(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("labels", "affine", "why"),
    [
        (np.zeros((4, 5, 7), np.uint8), AFFINE, "4 x 5 x 7 voxels, its image is 4 x 5 x 6"),
        (np.zeros((4, 5, 6), np.uint8), AFFINE @ np.diag([1.0, 1.0, 1.1, 1.0]), "affines differ by up to 1.5 mm"),
        (np.full((4, 5, 6), 0.5, np.float32), AFFINE, "not whole numbers"),
        (np.zeros((4, 5, 6, 2), np.uint8), AFFINE, "a mask of 2 modalities"),
    ],
)
def test_a_mask_that_does_not_fit_its_image_says_why(
    tmp_path: Path, labels: np.ndarray, affine: np.ndarray, why: str
) -> None:
    path = write_nii(tmp_path / "m.nii.gz", labels, affine)
    with pytest.raises(BrokenSampleError, match=why):
        read_volume_mask(path, Volume(VOXELS, AFFINE))


def test_rounding_in_a_masks_header_is_forgiven(tmp_path: Path) -> None:
    path = write_nii(tmp_path / "m.nii.gz", np.zeros((4, 5, 6), np.uint8), AFFINE + 1e-3)
    assert not read_volume_mask(path, Volume(VOXELS, AFFINE)).any()


def test_what_is_written_is_read_back_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    labels = (VOXELS % 3).astype(np.uint8)
    write_nifti(tmp_path / "a" / "p.nii.gz", labels, AFFINE)
    first = (tmp_path / "a" / "p.nii.gz").read_bytes()
    write_nifti(tmp_path / "a" / "p.nii.gz", labels, AFFINE)
    assert (tmp_path / "a" / "p.nii.gz").read_bytes() == first
    back = nibabel.load(tmp_path / "a" / "p.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), labels)
    np.testing.assert_allclose(back.affine, AFFINE)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["p.nii.gz"]


def test_a_bomb_is_refused_by_what_its_file_could_hold(tmp_path: Path) -> None:
    image = read_volume(write_nii(tmp_path / "image.nii", VOXELS, AFFINE))
    write_nii(tmp_path / "bomb.nii.gz", np.zeros((400, 400, 300), np.uint8), AFFINE)

    assert "more than 33,554,432 of such a file" in reason(tmp_path / "bomb.nii.gz")
    with pytest.raises(BrokenSampleError, match="more than 33,554,432 of such a file"):
        read_volume_mask(tmp_path / "bomb.nii.gz", image)


def contradicting(path: Path, spacing: tuple[float, ...], qform: np.ndarray | None = None) -> Path:
    """Write a NIfTI whose sform is ``AFFINE``, with another pixdim or qform."""
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.set_qform(AFFINE if qform is None else qform, code=1)
    image.set_sform(AFFINE, code=1)
    image.header.set_zooms(spacing)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_pixdim_that_contradicts_the_sform_is_told_and_the_sform_used(tmp_path: Path, suffix: str) -> None:
    volume = read_volume(contradicting(tmp_path / f"a{suffix}", (1.0, 1.0, 1.0)))

    assert volume.spacing == pytest.approx((0.5, 0.75, 3.0))
    (alert,) = volume.alerts
    assert alert.startswith(
        "its header has two spacings: 0.5 x 0.75 x 3 mm by its sform, which is used for slices and metrics, and "
        "1 x 1 x 1 mm by its pixdim"
    )


def test_a_qform_that_is_mirrored_against_the_sform_is_told(tmp_path: Path) -> None:
    mirrored = np.diag([-1.0, 1.0, 1.0, 1.0]) @ AFFINE
    volume = read_volume(contradicting(tmp_path / "a.nii", (0.5, 0.75, 3.0), mirrored))

    assert volume.alerts == (
        "its header has two orientations: LAS by its sform, which is used, and RAS by its qform, so sides may be "
        "exchanged; correct the header if the sform is wrong",
    )


def test_a_header_that_agrees_has_no_alerts(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[:3, 3] += 7
    for number, qform in enumerate((AFFINE, shifted)):
        path = contradicting(tmp_path / f"{number}.nii", (0.5, 0.75, 3.004), qform)
        assert read_volume(path).alerts == ()
    only_qform = nibabel.Nifti1Image(VOXELS, None)
    only_qform.set_qform(AFFINE, code=1)
    nibabel.save(only_qform, tmp_path / "q.nii")
    assert read_volume(tmp_path / "q.nii").alerts == ()


@pytest.mark.parametrize(
    ("written", "named", "said"),
    [
        ("a.nii", "b.nii.gz", "is not compressed, though its name ends in .nii.gz; let its name end in .nii"),
        ("a.nii.gz", "b.nii", "is compressed, though its name ends in .nii; let its name end in .nii.gz"),
    ],
)
def test_a_name_that_contradicts_the_compression_is_told(tmp_path: Path, written: str, named: str, said: str) -> None:
    write_nii(tmp_path / written, np.zeros((4, 5, 6), np.uint8), AFFINE)
    (tmp_path / written).rename(tmp_path / named)

    with pytest.raises(BrokenSampleError) as caught:
        read_volume(tmp_path / named)
    assert str(caught.value) == said
    with pytest.raises(BrokenSampleError, match="compressed, though"):
        read_volume_mask(tmp_path / named, Volume(VOXELS, AFFINE))


def test_a_surface_is_refused_by_what_it_is(tmp_path: Path) -> None:
    axes = nibabel.cifti2.ScalarAxis(["a"]), nibabel.cifti2.BrainModelAxis.from_surface([0, 1], 4, "CortexLeft")
    nibabel.save(nibabel.Cifti2Image(np.zeros((1, 2), np.float32), axes), tmp_path / "a.nii")

    for read in (read_volume, read_nifti):
        with pytest.raises(BrokenSampleError, match="a Cifti2Image, not voxels"):
            read(tmp_path / "a.nii")
