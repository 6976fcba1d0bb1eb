"""What leaves a site with DICOM files tells no name and no patient, and its owner can still find every file."""

from __future__ import annotations

import csv
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.importers.pseudonyms import open_site, readable_folder
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data.site_folder.pairing import pair_files
from fedsca_pipeline.errors import DataError

SITE = "clinic"
PATIENTS = ("ANNA", "BERT", "CARL", "DORA", "EMIL")


@pytest.fixture
def raw(tmp_path: Path, dicom_files: Any) -> Path:
    """Five patients of two images each, called by the patient's name, with masks as PNG."""
    rng = np.random.default_rng(0)
    for patient in PATIENTS:
        for view in (1, 2):
            stored = rng.integers(0, 4096, (32, 24)).astype(np.uint16)
            name = f"{patient}_{view}"
            dicom_files.frame(tmp_path / "raw" / SITE / "images" / f"{name}.dcm", stored, PatientID=f"ID-{patient}")
            write_mask(tmp_path / "raw" / SITE / "masks" / f"{name}.png")
    return tmp_path / "raw"


def write_mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((32, 24), np.uint8)
    mask[4:12, 4:12] = 1
    Image.fromarray(mask).save(path)


@pytest.fixture
def private(tmp_path: Path) -> Path:
    return tmp_path / "private" / SITE


def names(private: Path) -> dict[str, str]:
    with (private / "names.csv").open(newline="") as stream:
        return {row["name"]: row["file"] for row in csv.DictReader(stream)}


def prepared(raw: Path, **settings: Any) -> Any:
    return prepare_site(raw, SITE, PreprocessingConfig(image_size=32, **settings), seed=1)


def test_pairs_have_salted_names_and_lead_to_the_raw_files(raw: Path, private: Path) -> None:
    source = open_site(raw, SITE, private)
    pairs, broken = pair_files(source.folder, source.home)

    assert not broken
    assert {names(private)[pair.image] for pair in pairs} == {f"images/{p}_{v}.dcm" for p in PATIENTS for v in (1, 2)}
    for pair in pairs:
        assert names(private)[pair.mask] == names(private)[pair.image].replace("images", "masks").replace("dcm", "png")
        original = raw / SITE / names(private)[pair.image]
        assert (source.folder / pair.image).read_bytes() == original.read_bytes()
    assert readable_folder(raw, SITE, private) == source.folder


def test_names_and_subjects_stay_with_the_salt_and_change_without_it(raw: Path, private: Path) -> None:
    open_site(raw, SITE, private)
    first = names(private)
    open_site(raw, SITE, private)
    assert names(private) == first
    shutil.rmtree(private)
    open_site(raw, SITE, private)
    assert not first.keys() & names(private).keys()


def test_the_private_folder_is_its_owners_alone(raw: Path, private: Path) -> None:
    open_site(raw, SITE, private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


def test_a_damaged_salt_stops_the_site(raw: Path, private: Path) -> None:
    open_site(raw, SITE, private)
    (private / "salt").write_bytes(b"")
    with pytest.raises(DataError, match="restore it"):
        open_site(raw, SITE, private)


def test_images_of_one_patient_have_one_subject_and_share_a_split(raw: Path, private: Path) -> None:
    manifest = prepared(raw).manifest
    owner = {row.image: names(private)[row.image].split("/")[1].split("_")[0] for row in manifest.itertuples()}
    by_patient = manifest.groupby(manifest["image"].map(owner))
    assert (by_patient["subject"].nunique() == 1).all()
    assert (by_patient["split"].nunique() == 1).all()
    assert manifest["subject"].nunique() == len(PATIENTS)
    assert manifest["subject"].str.fullmatch("[0-9a-f]{16}").all()


def test_issuers_tell_patients_of_one_number_apart(raw: Path, dicom_files: Any) -> None:
    for index, path in enumerate(sorted((raw / SITE / "images").iterdir())):
        stored = np.random.default_rng(index).integers(0, 99, (32, 24)).astype(np.uint16)
        dicom_files.frame(path, stored, PatientID="1", IssuerOfPatientID=path.name.split("_")[0])
    assert prepared(raw).manifest["subject"].nunique() == len(PATIENTS)


def test_a_rule_of_site_yml_wins_over_patient_ids_and_is_hashed_too(raw: Path, private: Path) -> None:
    (raw / SITE / "site.yml").write_text('group: "^(A|B|C|D|E)"\n')
    (raw / SITE / "images" / "ANNA_1.dcm").rename(raw / SITE / "images" / "BELA_1.dcm")
    (raw / SITE / "masks" / "ANNA_1.png").rename(raw / SITE / "masks" / "BELA_1.png")
    found = prepared(raw)
    sizes = sorted(found.manifest.groupby("subject").size())
    assert sizes == [1, 2, 2, 2, 3]
    assert "(A|B|C|D|E)" not in json.dumps(found.report)


def test_who_cannot_be_told_is_refused(raw: Path, private: Path, dicom_files: Any) -> None:
    stored = np.random.default_rng(5).integers(0, 99, (32, 24)).astype(np.uint16)
    dicom_files.frame(raw / SITE / "images" / "ANNA_1.dcm", stored, PatientID="")
    report = prepared(raw, on_bad_sample="quarantine").report
    (entry,) = report["broken"]
    assert names(private)[entry["file"]] == "images/ANNA_1.dcm"
    assert "no PatientID" in entry["reason"]

    (raw / SITE / "site.yml").write_text('group: "^(ANNA|BERT|CARL|DORA)"\n')
    report = prepared(raw, on_bad_sample="quarantine").report
    assert [names(private)[entry["file"]] for entry in report["broken"]].count("images/EMIL_1.dcm") == 1
    assert "finds no subject" in report["broken"][0]["reason"]


def spoil(raw: Path, dicom_files: Any) -> None:
    """Every kind of fault that a file can have, each with a name in it."""
    images, masks = raw / SITE / "images", raw / SITE / "masks"
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
    (images / "DORA_1.dcm").symlink_to(raw / "secret_IDA.dcm")
    (raw / "secret_IDA.dcm").write_text("IDA")
    (raw / SITE / "site.yml").write_text("notes: none\n")


SAID = ("ANNA", "BERT", "CARL", "DORA", "EMIL", "FRED", "GRETA", "HANS", "IDA", "ILSE")


def test_no_fault_of_a_file_tells_its_name_and_the_table_does(raw: Path, private: Path, dicom_files: Any) -> None:
    spoil(raw, dicom_files)
    found = prepared(raw, on_bad_sample="quarantine", min_images=3)
    told = json.dumps(found.report) + found.manifest.to_csv()
    with pytest.raises(DataError) as refused:
        prepared(raw)
    told += str(refused.value)

    assert not [name for name in SAID if name in told.replace(str(private), "")]
    assert str(private / "names.csv") in str(refused.value)
    blamed = {names(private)[entry["file"]] for entry in found.report["broken"]}
    assert {
        "images/ANNA_1.dcm",
        "masks/ANNA_2.png",
        "images/BERT_1.dcm",
        "masks/FRED_1.png",
        "images/scan.GRETA",
    } <= blamed
    assert any("leads out of the site folder" in entry["reason"] for entry in found.report["broken"])


@pytest.mark.parametrize("content", ["subjects: {ANNA_1: [1]}\n", "ANNA: 1\n", "subjects: {ANNA_1: 1\n"])
def test_a_wrong_site_yml_is_told_without_what_is_in_it(raw: Path, private: Path, content: str) -> None:
    (raw / SITE / "site.yml").write_text(content)
    with pytest.raises(DataError, match=r"site\.yml") as refused:
        open_site(raw, SITE, private)
    assert "ANNA" not in str(refused.value)


def test_series_frames_and_segmentations_get_suffixes_that_say_so(
    tmp_path: Path, private: Path, dicom_files: Any
) -> None:
    home = tmp_path / "raw" / SITE
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    slices = dicom_files.slices(np.zeros((6, 5, 4), np.uint16), affine)
    labels = np.zeros((4, 5, 6, 1), np.uint8)
    labels[1, 2, 2, 0] = 1
    dicom_files.series(home / "images" / "1.2.840.7", slices)
    dicom_files.segmentation(home / "masks" / "1.2.840.7.dcm", slices, labels)
    dicom_files.save(home / "images" / "flat", slices[0])
    dicom_files.segmentation(home / "masks" / "flat.dcm", slices[:1], labels[1:2])

    source = open_site(tmp_path / "raw", SITE, private)
    pairs, broken = pair_files(source.folder, source.home)

    assert not broken
    suffixes = {(Path(pair.image).suffix, Path(pair.mask).suffix) for pair in pairs}
    assert suffixes == {(".series", ".seg"), (".dcm", ".dcm")}


def test_a_site_without_dicom_keeps_its_names_unless_it_asks(tmp_path: Path, private: Path) -> None:
    for kind in ("images", "masks"):
        write_mask(tmp_path / "raw" / SITE / kind / "ANNA.png")
    source = open_site(tmp_path / "raw", SITE, private)
    assert (source.folder, source.names) == (tmp_path / "raw" / SITE, None)
    assert not private.exists()

    (tmp_path / "raw" / SITE / "site.yml").write_text("hide_names: true\n")
    source = open_site(tmp_path / "raw", SITE, private)
    assert "ANNA" not in str(pair_files(source.folder, source.home))
    assert source.legend
    assert readable_folder(tmp_path / "raw", SITE, private) == source.folder

    (tmp_path / "raw" / SITE / "site.yml").unlink()
    open_site(tmp_path / "raw", SITE, private)
    assert readable_folder(tmp_path / "raw", SITE, private) == tmp_path / "raw" / SITE
