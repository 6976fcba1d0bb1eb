"""Patients whose DICOM files are imported stay unknown: no file, log line or page of any command identifies them."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import sqlite3
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.uid import RLELossless

FLAT, STACKED = "harbour", "meadow"
ROOT = "1.2.826.0.1.4711"
# What is in the input: in elements, and in file and folder names.
WORDS = (
    "QUETZAL",
    "XYLOPHON",
    "PID-88",
    "ISSUER-77",
    "ACC-66",
    "19020304",
    "Zwickmuehle",
    "Doktor^Allwissend",
    "STATION-55",
    "SER-44-DESC",
    ROOT,
)


def identifying(number: int, kind: str) -> dict[str, Any]:
    return {
        "PatientName": f"QUETZAL^XYLOPHON {number}",
        "PatientID": f"PID-88{number}",
        "IssuerOfPatientID": "ISSUER-77",
        "PatientBirthDate": "19020304",
        "AccessionNumber": "ACC-66",
        "InstitutionName": "Zwickmuehle",
        "ReferringPhysicianName": "Doktor^Allwissend",
        "StationName": "STATION-55",
        "SeriesDescription": "SER-44-DESC",
        "StudyInstanceUID": f"{ROOT}.1.{number}",
        "SeriesInstanceUID": f"{ROOT}.2.{kind}.{number}",
        "FrameOfReferenceUID": f"{ROOT}.3.{number}",
    }


def disc(number: int, shape: tuple[int, ...]) -> np.ndarray:
    centre = [side / 2 + number % 3 - 1 for side in shape]
    grid = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum(((axis - middle) / side) ** 2 for axis, middle, side in zip(grid, centre, shape, strict=True)) < 0.06


def grey(number: int, mask: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(number).integers(0, 300, mask.shape)
    return (noise + 600 * mask).astype(np.uint16)


def write_flat_site(folder: Path, dicom_files: Any) -> None:
    """Frames, half of them compressed, with masks as PNG and SEG, and files that cannot be used."""
    for number in range(8):
        mask = disc(number, (40, 32))
        name = f"QUETZAL_{number}"
        elements = identifying(number, "1") | {"SOPInstanceUID": f"{ROOT}.4.{number}"}
        data = dicom_files.data_set(grey(number, mask), RescaleSlope=1, RescaleIntercept=-100, **elements)
        if number % 2:
            data.compress(RLELossless, generate_instance_uid=False)
        dicom_files.save(folder / "images" / f"{name}.dcm", data)
        if number % 4 == 0:
            dicom_files.segmentation(folder / "masks" / f"{name}.dcm", [data], mask[None, ..., None].astype(np.uint8))
        else:
            (folder / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
    broken = (folder / "images" / "QUETZAL_7.dcm").read_bytes()
    # Cut in its pixels, and a value of which pydicom warns, with the value.
    (folder / "images" / "QUETZAL_7.dcm").write_bytes(broken[:-60].replace(f"{ROOT}.3".encode(), b"1.2.826.0.1.4711.Z"))
    (folder / "images" / "notes_on.XYLOPHON").write_text("XYLOPHON")
    (folder / "masks" / "QUETZAL_without_image.png").write_bytes(b"QUETZAL")


def write_stacked_site(folder: Path, dicom_files: Any) -> None:
    """Series of six slices in folders, with masks as SEG; one lacks a slice."""
    affine = np.array([[-0.8, 0.0, 0.0, 10.0], [0.0, -0.8, 0.0, 20.0], [0.0, 0.0, 2.5, -30.0], [0.0, 0.0, 0.0, 1.0]])
    for number in range(6):
        mask = disc(number, (32, 32, 6))
        slices = dicom_files.slices(grey(100 + number, mask), affine, **identifying(number, "2"))
        for index, data in enumerate(slices):
            data.SOPInstanceUID = f"{ROOT}.5.{number}.{index}"
            data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        name = f"XYLOPHON_{number}"
        labels = mask.transpose(2, 1, 0)[..., None].astype(np.uint8)
        dicom_files.segmentation(folder / "masks" / f"{name}.dcm", slices, labels)
        kept = slices if number else slices[:2] + slices[3:]
        for index, data in enumerate(kept):
            dicom_files.save(folder / "images" / name / f"QUETZAL_{index}.dcm", data)


def needles() -> list[bytes]:
    """The words as text of one and two bytes, in base64 at each of its three places, and as plain hashes."""
    found: list[bytes] = []
    for word in WORDS:
        text = word.lower().encode()
        found += [text, word.lower().encode("utf-16-le")]
        for shift in range(3):
            encoded = base64.b64encode(b" " * shift + word.encode())
            # The ends depend on what stands beside; what is left of a short word is in any text.
            inner = encoded[4 if shift else 0 : -4].lower()
            found += [inner] if len(inner) >= 8 else []
    for number in range(8):
        for way in (hashlib.md5, hashlib.sha1, hashlib.sha256):
            found += [
                way(f"{prefix}PID-88{number}".encode()).hexdigest()[:12].encode() for prefix in ("", "ISSUER-77\0")
            ]
    return found


def told(content: bytes, sought: Sequence[bytes]) -> list[bytes]:
    lower = content.lower()
    return [needle for needle in sought if needle in lower]


def contents(path: Path) -> Iterator[bytes]:
    """A file's bytes; unpacked too, where it is packed, and whole strings of a database."""
    raw = path.read_bytes()
    yield raw
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    if raw[:4] == b"\x89PNG":
        with Image.open(path) as image:
            yield str(image.info).encode()
    if raw[:15] == b"SQLite format 3":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            yield "\n".join(database.iterdump()).encode()


def everything(root: Path, *, without: Sequence[Path] = ()) -> dict[str, list[bytes]]:
    """What each file below ``root`` tells, by its name or content; files that tell nothing are left out."""
    sought = needles()
    found = {}
    for path in sorted(root.rglob("*")):
        if any(path.is_relative_to(folder) for folder in without):
            continue
        hits = told(str(path.relative_to(root)).encode(), sought)
        if path.is_file():
            hits += [hit for content in contents(path) for hit in told(content, sought)]
        if hits:
            found[str(path.relative_to(root))] = hits
    return found


@pytest.fixture
def sources(tmp_path: Path, dicom_files: Any) -> Path:
    """The folders that are imported."""
    write_flat_site(tmp_path / "sources" / FLAT, dicom_files)
    write_stacked_site(tmp_path / "sources" / STACKED, dicom_files)
    return tmp_path / "sources"


@pytest.fixture
def imported(workplace: Any, sources: Path) -> tuple[Any, list[Any]]:
    """A workplace with both sites imported, and the commands that did it."""
    commands = []
    for site in (FLAT, STACKED):
        params = f"importer=dicom,source={sources / site},import_options.site={site}"
        commands.append(workplace.run("import_sites", f"{params},preprocessing.on_bad_sample=quarantine"))
        assert commands[-1].code == 0, commands[-1].output
    return workplace, commands


def printed(*commands: Any) -> list[bytes]:
    """The needles in what commands printed; the terminal breaks lines anywhere."""
    return [hit for done in commands for hit in told("".join(done.output.split()).encode(), needles())]


def test_no_file_or_line_of_an_import_and_of_training_identifies_a_patient(imported: Any, sources: Path) -> None:
    place, commands = imported
    private = place.data / "private"
    done = place.run()

    assert done.code == 0, done.output
    assert everything(place.root, without=[private]) == {}
    assert printed(*commands, done) == []

    # The right files were read, and the search finds what is there.
    assert everything(sources).keys() >= {f"{FLAT}/images/QUETZAL_1.dcm", f"{STACKED}/images/XYLOPHON_1"}
    assert set(everything(private)) >= {f"{FLAT}/names.csv", f"{STACKED}/names.csv"}
    manifests = {site: pd.read_csv(place.manifest(site)) for site in (FLAT, STACKED)}
    assert manifests[FLAT]["subject"].nunique() == 7
    assert manifests[STACKED]["volume"].nunique() == 5
    assert len(place.parents()) == 1
    predicted = {path.name for path in (place.data / "07_model_output" / "predictions" / STACKED).iterdir()}
    test = manifests[STACKED][manifests[STACKED]["split"] == "test"]
    assert predicted == {f"{name}.nii.gz" for name in test["volume"]} != set()


def test_a_refused_import_identifies_no_patient_and_its_owner_finds_the_file(workplace: Any, sources: Path) -> None:
    private = workplace.data / "private"
    refused = workplace.run("import_sites", f"importer=dicom,source={sources / FLAT},import_options.site={FLAT}")

    assert refused.code == 1, refused.output
    assert everything(workplace.root, without=[private]) == {}
    assert printed(refused) == []
    with (private / FLAT / "names.csv").open(newline="") as stream:
        names = {row["file"]: row["name"] for row in csv.DictReader(stream)}
    said = "".join(refused.output.split())
    assert names["images/QUETZAL_7.dcm"] in said
    assert str(private / FLAT / "names.csv") in said


def test_dicom_files_in_raw_data_are_refused_with_the_import_command(workplace: Any, dicom_files: Any) -> None:
    write_flat_site(workplace.raw / FLAT, dicom_files)

    refused = workplace.run("preprocessing")
    report = workplace.run("data_report", "data_report.embedding=false")

    assert (refused.code, report.code) == (1, 1), refused.output + report.output
    assert f"importer=dicom,source=<newplace>,import_options.site={FLAT}" in "".join(refused.output.split())
    assert everything(workplace.root, without=[workplace.raw]) == {}
    assert printed(refused, report) == []


def test_the_data_report_identifies_no_patient(imported: Any) -> None:
    place, _ = imported
    report = place.reporting / "data_report"

    done = place.run("data_report", "data_report.embedding=false")

    assert done.code == 0, done.output
    assert everything(place.root, without=[place.data / "private"]) == {}
    assert printed(done) == []
    for site in (FLAT, STACKED):
        page = (report / f"{site}.html").read_text()
        assert "data:image/jpeg" in page
        assert f"private/{site}/names.csv" in page
    assert "data:image/jpeg" not in (report / "index.html").read_text()


@pytest.mark.timeout(1800)
@pytest.mark.slow
def test_no_folder_of_a_deployed_run_identifies_a_patient(imported: Any, sources: Path, new_deployed: Any) -> None:
    place, _ = imported
    third = f"importer=dicom,source={sources / FLAT},import_options.site=summit"
    done = place.run("import_sites", f"{third},preprocessing.on_bad_sample=quarantine")
    assert done.code == 0, done.output

    deployed = new_deployed(raw=place.raw)
    output = deployed.run()

    assert told("".join(output.split()).encode(), needles()) == []
    assert everything(deployed.folder) == {}
    assert list(deployed.folder.glob("*/03_primary/manifest.csv"))
