"""A PACS export to a site: identifiers say what belongs together; no identifier and no file name is written."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from importing import import_sites
from PIL import Image
from pydicom import dcmread

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.importers import find_importer
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.errors import ConfigError, DataError

AFFINE = np.diag([-0.5, -0.75, 3.0, 1.0])
ORGAN, LESION = np.zeros((4, 5, 6), np.uint8), np.zeros((4, 5, 6), np.uint8)
ORGAN[1:, 1:4, 1:4], LESION[2, 4, 5] = 1, 1


def stored(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, (6, 5, 4)).astype(np.int16)


def save_labelled(dicom_files: Any, path: Path, sources: Sequence[Any], masks: Mapping[str, np.ndarray]) -> Path:
    """Write a SEG whose segments, in this order, have these labels."""
    dicom_files.segmentation(path, sources, np.stack([*masks.values()], axis=-1))
    data = dcmread(path)
    for item, label in zip(data.SegmentSequence, masks, strict=True):
        item.SegmentLabel = label
    data.save_as(path)
    return path


@pytest.fixture
def export(tmp_path: Path, dicom_files: Any) -> Path:
    """Two patients' series, shuffled into folders with their names, one copied twice, and what else is on a disc."""
    source = tmp_path / "PACS Export"
    for number, patient in enumerate(("Müller Jürgen", "O'Brien Anne")):
        slices = dicom_files.slices(stored(number), AFFINE, PatientID=f"47110{number}")
        for place, data in enumerate(reversed(slices)):
            dicom_files.save(source / patient / "2023-01-15" / f"1.2.840.{place}", data)
        masks = {"organ": ORGAN, "lesion": LESION}
        if number:
            masks = dict(reversed(masks.items()))
        save_labelled(dicom_files, source / patient / "other" / "seg", slices, masks)
        dicom_files.save(source / "again" / f"copy {number}.dcm", slices[0])
    (source / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(40))
    (source / "Viewer.exe").write_bytes(b"MZ")
    (source / "._1.dcm").write_bytes(b"\0\5\x16\7")
    return source


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(source: Path, quarantine: bool = False, **options: str) -> dict[str, Any]:
        return import_sites(tmp_path / "01_raw", find_importer("dicom", source, options), source, quarantine=quarantine)

    return run


def test_series_and_their_segmentations_become_a_site(tmp_path, export, imported) -> None:
    summary = imported(export, segments="organ|lesion")

    site = tmp_path / "01_raw" / "dicom"
    assert summary["dicom"]["images"] == summary["dicom"]["subjects"] == 2
    assert summary["dicom"]["pixels"] == {"background": 2 * (120 - 27 - 1), "organ": 2 * 27, "lesion": 2}
    assert summary["dicom"]["broken"] == []
    images = [nibabel.load(path) for path in sorted((site / "images").iterdir())]
    assert sorted(np.asarray(image.dataobj).tobytes() for image in images) == sorted(
        stored(number).tobytes() for number in range(2)
    )
    for image in images:
        assert image.get_data_dtype() == np.int16
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        mask = nibabel.load(site / "masks" / Path(image.get_filename()).name)
        np.testing.assert_array_equal(mask.affine, image.affine)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), (ORGAN + 2 * LESION).transpose(2, 1, 0))
    names = " ".join(path.as_posix() for path in site.rglob("*")) + (site / "site.yml").read_text()
    assert not any(name in names for name in ("ller", "Brien", "4711", "1.2.840"))


def test_an_imported_site_can_be_prepared(tmp_path, export, imported, dicom_files) -> None:
    for number in range(2, 5):
        slices = dicom_files.slices(stored(number), AFFINE, PatientID=f"47110{number}")
        dicom_files.series(export / f"p{number}", slices)
        save_labelled(dicom_files, export / f"p{number}" / "s.dcm", slices, {"organ": ORGAN})
    imported(export, site="clinic", segments="organ|lesion")
    config = PreprocessingConfig(image_size=16, classes=2, min_images=3)

    prepared = prepare_site(tmp_path / "01_raw", "clinic", config, seed=0)

    assert prepared.report["counts"]["used"] == prepared.report["counts"]["subjects"] == 5
    assert prepared.report["hashed_names"]


def test_without_segments_labels_in_order_of_the_alphabet_are_the_classes(export, imported) -> None:
    assert list(imported(export)["dicom"]["pixels"]) == ["background", "lesion", "organ"]


def test_a_segment_that_is_not_asked_for_is_background(export, imported) -> None:
    assert imported(export, segments="lesion")["dicom"]["pixels"] == {"background": 2 * 119, "lesion": 2}


def test_overlapping_segments_need_an_order(tmp_path, dicom_files, imported) -> None:
    slices = dicom_files.slices(stored(0), AFFINE)
    dicom_files.series(tmp_path / "source" / "a", slices)
    inside = ORGAN * (np.arange(6) < 2).astype(np.uint8)
    save_labelled(dicom_files, tmp_path / "source" / "s.dcm", slices, {"organ": ORGAN, "lesion": inside})

    with pytest.raises(DataError, match=r"its segments overlap; name all in import_options\.segments"):
        imported(tmp_path / "source")

    pixels = imported(tmp_path / "source", segments="organ|lesion")["dicom"]["pixels"]
    assert pixels == {"background": 120 - 27, "organ": 18, "lesion": 9}


def test_an_import_of_which_nothing_is_left_fails(tmp_path, dicom_files, imported) -> None:
    slices = dicom_files.slices(stored(0), AFFINE, PatientID="")
    dicom_files.series(tmp_path / "source" / "a", slices)
    save_labelled(dicom_files, tmp_path / "source" / "s.dcm", slices, {"organ": ORGAN})

    with pytest.raises(DataError, match=r"(?s)1 broken file:.*Fix them; nothing else is there"):
        imported(tmp_path / "source", quarantine=True)

    assert not (tmp_path / "01_raw" / "dicom").exists()


def test_segmentations_of_one_series_in_several_files_are_joined(tmp_path, dicom_files, imported) -> None:
    slices = dicom_files.slices(stored(0), AFFINE)
    dicom_files.series(tmp_path / "source" / "a", slices)
    for name, mask in {"organ": ORGAN, "lesion": LESION}.items():
        save_labelled(dicom_files, tmp_path / "source" / f"{name}.dcm", slices, {name: mask})

    assert imported(tmp_path / "source")["dicom"]["pixels"] == {"background": 92, "lesion": 1, "organ": 27}


def test_files_without_a_position_are_images_of_their_own(tmp_path, dicom_files, imported) -> None:
    source, grey = tmp_path / "source", np.arange(30, dtype=np.uint16).reshape(5, 6)
    for number in range(2):
        data = dicom_files.data_set(grey + number, PatientID="P", SeriesInstanceUID="1.2.3", StudyInstanceUID="1.2")
        masks = {"cyst": ORGAN[1:2] if number else LESION[2:3]}
        save_labelled(dicom_files, source / f"s{number}", [data], masks)
        del data.ImagePositionPatient
        dicom_files.save(source / f"i{number}", data)

    summary = imported(source)

    assert (summary["dicom"]["images"], summary["dicom"]["subjects"]) == (2, 1)
    masks = [np.asarray(Image.open(path)).sum() for path in (tmp_path / "01_raw" / "dicom" / "masks").glob("*.png")]
    assert sorted(masks) == [1, 9]
    images = [np.asarray(Image.open(path)) for path in (tmp_path / "01_raw" / "dicom" / "images").glob("*.png")]
    assert sorted(image.tobytes() for image in images) == sorted((grey + number).tobytes() for number in range(2))


def test_a_broken_file_is_named_by_its_hash_and_the_private_table_lists_it(
    tmp_path, export, imported, dicom_files
) -> None:
    alone = dicom_files.slices(stored(7), AFFINE, PatientID="4711007")
    dicom_files.series(export / "Meier Erna" / "no segmentation", alone)
    nameless = dicom_files.slices(stored(8), AFFINE, PatientID="")
    dicom_files.series(export / "Meier Erna" / "nobody", nameless)
    save_labelled(dicom_files, export / "Meier Erna" / "nobody.dcm", nameless, {"organ": ORGAN})
    elsewhere = dicom_files.slices(stored(9), AFFINE)
    save_labelled(dicom_files, export / "Meier Erna" / "lost.dcm", elsewhere, {"organ": ORGAN})
    (export / "Meier Erna" / "bad.dcm").write_bytes(bytes(128) + b"DICM" + b"Meier^Erna")

    with pytest.raises(DataError) as caught:
        imported(export)

    message = str(caught.value)
    assert "4 broken files" in message
    for reason in (
        "no segmentation (SEG) refers to it",
        "holds no PatientID",
        "of an image that is not there",
        "cannot",
    ):
        assert reason in message
    assert not any(name in message for name in ("Erna", "Meier", "4711"))
    table = tmp_path / "private" / "dicom" / "names.csv"
    assert str(table) in message
    assert "Meier Erna/lost.dcm" in table.read_text()
    assert stat.S_IMODE(table.parent.stat().st_mode) == 0o700
    summary = imported(export, quarantine=True)
    assert [summary["dicom"]["images"], len(summary["dicom"]["broken"])] == [2, 4]
    assert yaml.safe_load((tmp_path / "01_raw" / "dicom" / "site.yml").read_text())["subjects"]


@pytest.fixture
def drawn(tmp_path: Path, dicom_files: Any) -> Path:
    """Two series without a segmentation: one has its mask in its folder, one beside it, on another order of axes."""
    source = tmp_path / "drawn"
    for number, patient in enumerate(("Erna", "Jürgen")):
        folder = dicom_files.series(
            source / patient, dicom_files.slices(stored(number), AFFINE, PatientID=f"47110{number}")
        )
        mask = nibabel.Nifti1Image((ORGAN + 2 * LESION).transpose(2, 1, 0), AFFINE)
        if number:
            turned = nibabel.orientations.axcodes2ornt("SRP")
            axes = nibabel.orientations.ornt_transform(nibabel.io_orientation(AFFINE), turned)
            mask = mask.as_reoriented(axes)
        nibabel.save(mask, source / "Jürgen.nii.gz" if number else folder / "label.nii.gz")
    return source


def test_a_nifti_in_the_folder_of_a_series_or_with_its_name_is_its_mask(tmp_path, drawn, imported) -> None:
    summary = imported(drawn, segments="organ|lesion")

    site = tmp_path / "01_raw" / "dicom"
    assert summary["dicom"]["pixels"] == {"background": 2 * (120 - 27 - 1), "organ": 2 * 27, "lesion": 2}
    images = [nibabel.load(path) for path in (site / "images").iterdir()]
    assert len(images) == 2
    for image in images:
        mask = nibabel.load(site / "masks" / Path(image.get_filename()).name)
        np.testing.assert_array_equal(np.asarray(mask.dataobj), (ORGAN + 2 * LESION).transpose(2, 1, 0))
        np.testing.assert_array_equal(mask.affine, image.affine)
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    names = " ".join(path.as_posix() for path in site.rglob("*")) + (site / "site.yml").read_text()
    assert not any(name in names for name in ("Erna", "rgen", "label.nii", "4711"))


def test_beside_segmentations_a_nifti_is_skipped_with_a_warning(export, imported, caplog) -> None:
    without = imported(export, site="without")
    nibabel.save(nibabel.Nifti1Image(ORGAN, AFFINE), export / "Erna.nii.gz")

    assert imported(export)["dicom"] == without["without"]

    warned = [record.getMessage() for record in caplog.records if record.name.startswith("fedsca_pipeline")]
    assert warned == [
        "1 NIfTI file skipped: the masks are the segmentations (SEG)",
        "passed over: 1 image file in 1 folder",
    ]


def test_a_nifti_that_lies_elsewhere_than_its_series_is_broken(tmp_path, drawn, imported) -> None:
    mirrored = AFFINE @ np.diag([-1.0, 1.0, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(ORGAN.transpose(2, 1, 0), mirrored), drawn / "Jürgen.nii.gz")

    found = imported(drawn, quarantine=True, segments="organ|lesion")["dicom"]

    assert found["images"] == 1
    (entry,) = found["broken"]
    assert "mm" in entry["reason"]


def test_a_nifti_of_several_values_without_names_or_whose_series_is_not_clear_is_broken(
    tmp_path, drawn, imported, dicom_files
) -> None:
    with pytest.raises(DataError, match="where one beside 0 was expected"):
        imported(drawn)

    dicom_files.series(drawn / "Erna" / "again", dicom_files.slices(stored(5), AFFINE, PatientID="4711"))
    for place, data in enumerate(dicom_files.slices(stored(6), AFFINE, PatientID="4711")):
        dicom_files.save(drawn / "Erna" / f"second {place}.dcm", data)
    (drawn / "lost").mkdir()
    nibabel.save(nibabel.Nifti1Image(ORGAN, AFFINE), drawn / "lost" / "Erna.nii.gz")

    found = imported(drawn, quarantine=True, segments="organ|lesion")["dicom"]

    assert found["images"] == 1
    reasons = sorted(entry["reason"] for entry in found["broken"])
    assert reasons == [
        "0 NIfTI masks, 1 folder, 1 image in the first",
        "1 NIfTI mask, 1 folder, 2 images in the first",
        "1 NIfTI mask, 1 folder, 2 images in the first",
        "a NIfTI without a series in its folder, or in the folder of its name",
    ]


def test_progress_counts_every_file(export) -> None:
    passed = []

    def watch(files: Sequence[Path]) -> Iterator[Path]:
        for file in files:
            yield file
            passed.append(file)

    find_importer("dicom", export, {}, watch)

    assert sorted(passed) == sorted(path for path in export.rglob("[!.]*") if path.is_file())


def test_a_missing_segment_and_a_source_without_segmentation_are_refused(tmp_path, export, dicom_files) -> None:
    with pytest.raises(ConfigError, match=r"no segment is labelled 'liver'; there are lesion\|organ"):
        find_importer("dicom", export, {"segments": "organ|liver"})

    dicom_files.series(tmp_path / "plain", dicom_files.slices(stored(0), AFFINE))
    with pytest.raises(DataError, match=r"4 DICOM files, and none is a segmentation"):
        find_importer("dicom", tmp_path / "plain", {})
