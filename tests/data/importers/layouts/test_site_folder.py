"""A site folder with DICOM files or hidden names: an import keeps its numbers and none of its names."""

from __future__ import annotations

import csv
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from importing import import_sites
from PIL import Image

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.importers import find_importer
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data.readers.dicom import read_frame, read_multiframe, read_series
from fedsca_pipeline.data.readers.images import read_image
from fedsca_pipeline.data.readers.volumes import read_volume
from fedsca_pipeline.errors import DataError

SITE = "clinic"
PATIENTS = ("ANNA", "BERT", "CARL", "DORA", "EMIL")
AFFINE = np.array([[-0.8, 0.0, 0.0, 10.0], [0.0, -0.7, 0.0, 20.0], [0.0, 0.0, 2.5, -30.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture
def source(tmp_path: Path, dicom_files: Any) -> Path:
    """Five patients of two images each, called by the patient's name, with masks as PNG."""
    rng = np.random.default_rng(0)
    for patient in PATIENTS:
        for view in (1, 2):
            stored = rng.integers(0, 4096, (32, 24)).astype(np.uint16)
            name = f"{patient}_{view}"
            dicom_files.frame(tmp_path / "source" / "images" / f"{name}.dcm", stored, PatientID=f"ID-{patient}")
            write_mask(tmp_path / "source" / "masks" / f"{name}.png")
    return tmp_path / "source"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    return tmp_path / "private" / SITE


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "01_raw" / SITE


@pytest.fixture
def imported(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Imports the source as a new site."""

    def run(name: str = "dicom", quarantine: bool = False, **options: str) -> dict[str, Any]:
        folder, raw = tmp_path / "source", tmp_path / "01_raw"
        shutil.rmtree(raw / SITE, ignore_errors=True)
        return import_sites(raw, find_importer(name, folder, {"site": SITE, **options}), folder, quarantine=quarantine)[
            SITE
        ]

    return run


def write_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((32, 24), np.uint8)
    mask[4:12, 4:12] = 1
    Image.fromarray(mask).save(path)


def names(private: Path) -> dict[str, str]:
    """What the hashed names of images stand for."""
    with (private / "names.csv").open(newline="") as stream:
        return {row["name"]: row["file"] for row in csv.DictReader(stream)}


def file_of(site: Path, private: Path, file: str) -> Path:
    """The imported image that stands for a file of the source."""
    (name,) = (name for name, own in names(private).items() if own == file)
    (path,) = (site / "images").glob(f"{name}.*")
    return path


def subjects(site: Path) -> dict[str, str]:
    return yaml.safe_load((site / "site.yml").read_text())["subjects"]


def test_images_and_masks_share_a_hashed_name_that_the_private_table_resolves(source, site, private, imported) -> None:
    assert imported()["images"] == 10

    images = {path.stem for path in (site / "images").iterdir()}
    assert images == {path.stem for path in (site / "masks").iterdir()} == set(names(private))
    assert set(names(private).values()) == {f"images/{patient}_{view}.dcm" for patient in PATIENTS for view in (1, 2)}
    assert all(len(name) == 16 and set(name) <= set("0123456789abcdef") for name in images)


def test_names_and_subjects_stay_with_the_salt_and_change_without_it(source, site, private, imported) -> None:
    imported()
    first, people = names(private), subjects(site)
    imported()
    assert (names(private), subjects(site)) == (first, people)
    shutil.rmtree(private)
    imported()
    assert not first.keys() & names(private).keys()
    assert not set(people.values()) & set(subjects(site).values())


def test_the_private_folder_is_readable_by_its_owner_alone(source, private, imported) -> None:
    imported()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert (
        stat.S_IMODE((private / "salt").stat().st_mode) == stat.S_IMODE((private / "names.csv").stat().st_mode) == 0o600
    )


def test_a_damaged_salt_stops_the_import(source, private, site, imported) -> None:
    imported()
    (private / "salt").write_bytes(b"")
    with pytest.raises(DataError, match="restore it"):
        imported()
    assert not site.exists()


def test_images_of_one_patient_have_one_subject_and_share_a_split(source, site, private, imported) -> None:
    imported()
    manifest = prepare_site(site.parent, SITE, PreprocessingConfig(image_size=32), seed=1).manifest
    owner = manifest["image"].map(lambda image: names(private)[Path(image).stem].split("/")[1].split("_")[0])
    assert (manifest.groupby(owner)["subject"].nunique() == 1).all()
    assert (manifest.groupby(owner)["split"].nunique() == 1).all()
    assert manifest["subject"].nunique() == len(PATIENTS)
    assert manifest["subject"].str.fullmatch("[0-9a-f]{16}").all()


def test_issuers_distinguish_patients_of_one_number(source, imported, dicom_files) -> None:
    for index, path in enumerate(sorted((source / "images").iterdir())):
        stored = np.random.default_rng(index).integers(0, 99, (32, 24)).astype(np.uint16)
        dicom_files.frame(path, stored, PatientID="1", IssuerOfPatientID=path.name.split("_")[0])
    assert imported()["subjects"] == len(PATIENTS)


def test_a_rule_of_site_yml_wins_over_patient_ids_and_is_hashed_too(source, site, imported) -> None:
    (source / "site.yml").write_text('group: "^(A|B|C|D|E)"\nspacing: [0.5, 0.25]\nnotes: "left eyes"\n')
    (source / "images" / "ANNA_1.dcm").rename(source / "images" / "BELA_1.dcm")
    (source / "masks" / "ANNA_1.png").rename(source / "masks" / "BELA_1.png")

    imported()

    assert sorted(list(subjects(site).values()).count(subject) for subject in set(subjects(site).values())) == [
        1, 2, 2, 2, 3,
    ]  # fmt: skip
    written = yaml.safe_load((site / "site.yml").read_text())
    assert "group" not in written
    assert written["spacing"] == [0.5, 0.25]
    assert written["notes"].startswith("left eyes ")
    assert written["hashed_names"] is True


def test_an_image_without_a_known_subject_is_refused(source, private, imported, dicom_files) -> None:
    stored = np.random.default_rng(5).integers(0, 99, (32, 24)).astype(np.uint16)
    dicom_files.frame(source / "images" / "ANNA_1.dcm", stored, PatientID="")
    (entry,) = imported(quarantine=True)["broken"]
    assert names(private)[entry["file"].removeprefix("image ")] == "images/ANNA_1.dcm"
    assert "no PatientID" in entry["reason"]

    (source / "site.yml").write_text('group: "^(ANNA|BERT|CARL|DORA)"\n')
    broken = imported(quarantine=True)["broken"]
    assert [names(private)[entry["file"].removeprefix("image ")] for entry in broken].count("images/EMIL_1.dcm") == 1
    assert "finds no subject" in broken[0]["reason"]


def spoil(source: Path, dicom_files: Any) -> None:
    """Every kind of fault that a file can have, each with a name in it."""
    images, masks = source / "images", source / "masks"
    (images / "ANNA_1.dcm").write_bytes((images / "ANNA_1.dcm").read_bytes()[:400])
    (masks / "ANNA_2.png").write_bytes(b"ANNA")
    (images / "ILSE_1.mha").write_text("NDims = 3\nDimSize = 2 2 2\nElementDataFile = ILSE.raw\n")
    (masks / "ILSE_1.nii").write_bytes(b"ILSE")
    (masks / "BERT_1.png").unlink()
    write_mask(masks / "FRED_1.png")
    shutil.copy(images / "BERT_2.dcm", images / "BERT_2")
    (images / "scan.GRETA").write_text("GRETA")
    (images / "HANS_folder").mkdir()
    write_mask(masks / "HANS_folder.png")
    dicom_files.frame(images / "CARL_1.dcm", np.zeros((9, 9), np.uint16), PatientID="ID-CARL")
    (images / "DORA_1.dcm").unlink()
    (images / "DORA_1.dcm").symlink_to(source.parent / "secret_IDA.dcm")
    (source.parent / "secret_IDA.dcm").write_text("IDA")
    (source / "site.yml").write_text("notes: none\n")


SAID = ("ANNA", "BERT", "CARL", "DORA", "EMIL", "FRED", "GRETA", "HANS", "IDA", "ILSE")


def test_no_fault_quotes_a_name_and_the_private_table_lists_every_broken_file(
    source, site, private, imported, dicom_files
) -> None:
    spoil(source, dicom_files)
    with pytest.raises(DataError) as refused:
        imported()
    found = imported(quarantine=True)
    written = "".join(str(path.relative_to(site)) for path in site.rglob("*")) + (site / "site.yml").read_text()

    said = json.dumps(found) + str(refused.value).replace(str(private), "") + written
    assert not [name for name in SAID if name in said]
    assert str(source) not in said
    assert str(private / "names.csv") in str(refused.value)
    blamed = {names(private)[entry["file"].removeprefix("image ")] for entry in found["broken"]}
    assert {
        "images/ANNA_1.dcm",
        "images/ANNA_2.dcm",
        "images/BERT_1.dcm",
        "masks/FRED_1.png",
        "images/scan.GRETA",
        "images/HANS_folder",
        "images/CARL_1.dcm",
        "images/DORA_1.dcm",
        "images/ILSE_1.mha",
    } <= blamed
    assert any("leads out of the site folder" in entry["reason"] for entry in found["broken"])


@pytest.mark.parametrize("content", ["subjects: {ANNA_1: [1]}\n", "ANNA: 1\n", "subjects: {ANNA_1: 1\n"])
def test_a_wrong_site_yml_is_refused_without_quoting_it(source, imported, content: str) -> None:
    (source / "site.yml").write_text(content)
    with pytest.raises(DataError, match=r"site\.yml") as refused:
        imported()
    assert "ANNA" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "elements"),
    [
        ("uint16", {}),
        ("uint8", {}),
        ("int16", {}),
        ("uint16", {"RescaleSlope": 1, "RescaleIntercept": -1024}),
        ("uint16", {"RescaleSlope": 0.37, "RescaleIntercept": 0.1}),
        ("uint32", {"RescaleSlope": 0.37, "RescaleIntercept": 0.1}),
        ("uint16", {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}),
    ],
    ids=["16 bit", "8 bit", "signed", "CT", "fractions", "doubles", "inverted"],
)
def test_a_single_frame_keeps_the_values_that_the_dicom_reader_gives(
    source, site, private, imported, dicom_files, kind: str, elements: dict[str, Any]
) -> None:
    stored = np.random.default_rng(3).integers(-900 if kind == "int16" else 0, 250, (32, 24)).astype(kind)
    path = dicom_files.frame(source / "images" / "ANNA_1.dcm", stored, PatientID="ID-ANNA", **elements)

    imported()

    written = read_image(file_of(site, private, "images/ANNA_1.dcm"))
    assert written.dtype == read_frame(path).dtype
    np.testing.assert_array_equal(written, read_frame(path))


def test_colours_become_the_same_rgb(source, site, private, imported, dicom_files) -> None:
    from pydicom.data import get_testdata_file

    rgb = np.random.default_rng(3).integers(0, 255, (32, 24, 3)).astype(np.uint8)
    dicom_files.frame(source / "images" / "ANNA_1.dcm", rgb, PatientID="ID-ANNA")
    palette = source / "images" / "BERT_1.dcm"
    shutil.copy(get_testdata_file("examples_palette.dcm"), palette)
    expected = read_frame(palette)
    Image.fromarray(np.zeros(expected.shape[:2], np.uint8)).save(source / "masks" / "BERT_1.png")

    imported()

    np.testing.assert_array_equal(read_image(file_of(site, private, "images/ANNA_1.dcm")), rgb)
    written = read_image(file_of(site, private, "images/BERT_1.dcm"))
    assert written.dtype == expected.dtype
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("elements", [{}, {"RescaleSlope": 1, "RescaleIntercept": -1024}], ids=["int16", "float32"])
def test_a_series_and_its_segmentation_keep_values_geometry_and_labels(
    tmp_path, site, private, imported, dicom_files, elements: dict[str, Any]
) -> None:
    source = tmp_path / "source"
    stored = np.random.default_rng(0).integers(-300, 4000, (6, 5, 4)).astype(np.int16)
    slices = dicom_files.slices(stored, AFFINE, **elements)
    labels = np.zeros((4, 5, 6, 2), np.uint8)
    labels[1, 2, 2:4, 0] = labels[2, 3, 4, 1] = 1
    folder = dicom_files.series(source / "images" / "1.2.840.7", slices[::-1])
    dicom_files.segmentation(source / "masks" / "1.2.840.7.dcm", slices, labels)
    dicom_files.save(source / "images" / "flat", slices[1])
    dicom_files.segmentation(source / "masks" / "flat.dcm", slices[1:2], labels[1:2, ..., :1])
    expected = read_series(folder)

    assert imported(segments="organ|lesion")["pixels"] == {"background": 120 - 3 + 30 - 2, "organ": 4, "lesion": 1}

    path = file_of(site, private, "images/1.2.840.7")
    image = nibabel.load(path)
    assert image.get_data_dtype() == expected.voxels.dtype == (np.float32 if elements else np.int16)
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected.voxels)
    np.testing.assert_array_equal(image.affine, expected.affine.astype(np.float32))
    np.testing.assert_array_equal(read_volume(path).voxels, expected.voxels)
    mask = np.asarray(nibabel.load(site / "masks" / path.name).dataobj)
    np.testing.assert_array_equal(mask, (labels[..., 0] + 2 * labels[..., 1]).transpose(2, 1, 0))
    flat = file_of(site, private, "images/flat")
    np.testing.assert_array_equal(np.asarray(Image.open(site / "masks" / f"{flat.stem}.png")), labels[1, ..., 0])


def test_a_multi_frame_file_keeps_values_and_geometry(tmp_path, site, private, imported, dicom_files) -> None:
    source = tmp_path / "source"
    slices = dicom_files.slices(np.arange(120, dtype=np.int16).reshape(6, 5, 4), AFFINE)
    path = dicom_files.save(source / "images" / "stack.dcm", dicom_files.enhanced(slices))
    expected = read_multiframe(path)
    (source / "masks").mkdir()
    mask = np.zeros(expected.shape, np.uint8)
    mask[2, 3, 1] = 1
    nibabel.save(nibabel.Nifti1Image(mask, expected.affine), source / "masks" / "stack.nii")

    imported()

    written = file_of(site, private, "images/stack.dcm")
    np.testing.assert_array_equal(np.asarray(nibabel.load(written).dataobj), expected.voxels)
    np.testing.assert_array_equal(nibabel.load(written).affine, expected.affine.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(nibabel.load(site / "masks" / written.name).dataobj), mask)


def test_the_label_rule_is_applied_and_an_unnamed_class_is_refused(source, site, private, imported) -> None:
    (source / "site.yml").write_text("label_map: {1: 2}\n")
    with pytest.raises(DataError, match=r"shows class 2, but import_options\.segments names 1"):
        imported()
    assert imported(segments="organ|lesion")["pixels"]["lesion"] == 10 * 64
    assert set(np.unique(np.asarray(Image.open(next((site / "masks").iterdir()))))) == {0, 2}


def test_a_written_file_holds_pixels_and_nothing_else(tmp_path, site, private, imported) -> None:
    from PIL.PngImagePlugin import PngInfo

    source = tmp_path / "source"
    write_mask(source / "masks" / "ANNA.png")
    text = PngInfo()
    text.add_text("Author", "ANNA")
    pixels = np.random.default_rng(0).integers(0, 255, (32, 24)).astype(np.uint8)
    (source / "images").mkdir()
    Image.fromarray(pixels).save(source / "images" / "ANNA.png", pnginfo=text)
    volume = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), AFFINE)
    volume.header["descrip"] = volume.header["intent_name"] = volume.header["aux_file"] = b"BERT"
    for kind in ("images", "masks"):
        nibabel.save(
            volume if kind == "images" else nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), AFFINE),
            source / kind / "BERT.nii.gz",
        )
    (source / "site.yml").write_text("hide_names: true\n")

    imported("site_folder")

    image = Image.open(file_of(site, private, "images/ANNA.png"))
    assert image.info == {}
    np.testing.assert_array_equal(np.asarray(image), pixels)
    written = nibabel.load(file_of(site, private, "images/BERT.nii.gz"))
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(volume.dataobj))
    for key in ("descrip", "aux_file", "intent_name", "db_name"):
        assert written.header[key] in (b"", np.bytes_(b"")) if key in written.header else True
    assert b"BERT" not in written.header.binaryblock
    assert not written.header.extensions


def test_an_import_of_patterns_hides_names_if_asked(tmp_path, imported) -> None:
    source, raw = tmp_path / "other", tmp_path / "01_raw"
    for name in ("ANNA_1", "ANNA_2", "BERT_1"):
        write_mask(source / "m" / f"{name}.png")
        Image.fromarray(np.full((32, 24), len(name) + ord(name[-1]), np.uint8)).save(source / f"{name}.png")
    write_mask(source / "m" / "CARL.png")
    (source / "import.yml").write_text(
        'patterns:\n  - {images: "{patient}_{view}.png", masks: "m/{patient}_{view}.png", site: clinic, '
        'stem: "{patient}_{view}", subject: "{patient}"}\n'
    )
    importer = find_importer("folders", source, {}, hide_names=True)

    summary = import_sites(raw, importer, source)

    assert (summary[SITE]["images"], summary[SITE]["subjects"]) == (3, 2)
    written = "".join(str(path.relative_to(raw)) for path in raw.rglob("*")) + (raw / SITE / "site.yml").read_text()
    assert not [name for name in SAID if name in written]
    assert set(names(tmp_path / "private" / SITE).values()) == {
        f"{name}.png" for name in ("ANNA_1", "ANNA_2", "BERT_1")
    }


def test_a_table_that_does_not_fit_is_not_quoted_if_names_are_hidden(tmp_path) -> None:
    source = tmp_path / "other"
    write_mask(source / "ANNA.png")
    write_mask(source / "m" / "ANNA.png")
    (source / "people.csv").write_text("id,site\nANNA,a\nANNA,b\n")
    (source / "import.yml").write_text(
        'patterns:\n  - {images: "{stem}.png", masks: "m/{stem}.png", site: clinic}\n'
        "table: {file: people.csv, key: id, site: site}\n"
    )
    importer = find_importer("folders", source, {}, hide_names=True)

    with pytest.raises(DataError, match="hide_names=false") as refused:
        import_sites(tmp_path / "01_raw", importer, source)

    assert "ANNA" not in str(refused.value)


@pytest.mark.parametrize("name", ["DICOMDIR", "Thumbs.db", "desktop.ini"])
def test_litter_beside_images_is_told_and_no_patient_is_missed(source, imported, name: str) -> None:
    (source / "images" / name).write_bytes(bytes(128) + b"DICM" + bytes(40))

    found = imported(quarantine=True, name="site_folder")

    assert found["images"] == 10
    (entry,) = found["broken"]
    assert entry["reason"] == "a table of contents, or what a file browser leaves, not an image"
    assert entry["cure"] == "delete it"
