"""``kedro run --pipeline=import_sites`` as a user types it."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import yaml
from PIL import Image

from fedsca_pipeline.data.importers.layouts.fets2022 import MODALITIES
from fedsca_pipeline.files import read_json


def polyps(folder: Path, images: int) -> Path:
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / "Kvasir-SEG" / kind).mkdir(parents=True)
    for number in range(images):
        mask = np.zeros((24, 32), np.uint8)
        mask[4:12, 6 : 10 + number] = 255
        Image.fromarray(generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(
            folder / "Kvasir-SEG" / "images" / f"p{number}.jpg"
        )
        Image.fromarray(mask).save(folder / "Kvasir-SEG" / "masks" / f"p{number}.jpg")
    return folder


def test_a_data_set_becomes_a_site_that_preprocessing_takes(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()

    done = place.run("import_sites", f"importer=polyps,source={polyps(tmp_path / 'polyps', 8)}")

    assert done.code == 0, done.output
    assert "Kvasir-SEG: 8 images of 8 subjects, 0 broken" in done.words
    assert "Classes: 1 polyp; train them with preprocessing.classes=1" in done.words
    assert (place.data / "01_raw" / "Kvasir-SEG" / "site.yml").is_file()
    assert read_json(place.data / "02_intermediate" / "import.json")["Kvasir-SEG"]["images"] == 8
    prepared = place.run("preprocessing")
    assert prepared.code == 0, prepared.output
    assert read_json(place.data / "02_intermediate" / "Kvasir-SEG" / "report.json")["counts"]["used"] == 8
    assert not (place.data / "01_raw" / "harbour_ct").exists()


def test_volumes_come_by_the_same_command_with_an_option(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()
    source = tmp_path / "fets"
    for subject in ("FeTS2022_00000", "FeTS2022_00002"):
        (source / subject).mkdir(parents=True)
        for kind in (*MODALITIES, "seg"):
            voxels = np.resize(np.array([0, 1, 2, 4], np.int16), (6, 5, 4))
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), source / subject / f"{subject}_{kind}.nii.gz")
    (source / "partitioning_2.csv").write_text("Partition_ID,Subject_ID\n1,FeTS2022_00000\n2,FeTS2022_00002\n")

    done = place.run("import_sites", f"importer=fets2022,source={source},import_options.partitioning=2")

    assert done.code == 0, done.output
    assert "3 enhancing tumour; train them with preprocessing.classes=3" in done.words
    assert "one to 3 of: 0 t1, 1 t1ce, 2 t2, 3 flair" in done.words
    settings = yaml.safe_load(done.output[done.output.index("preprocessing:\n") :])["preprocessing"]
    assert settings["class_names"] == ["necrotic core", "oedema", "enhancing tumour"]
    assert settings["volume"] == {"modalities": [0, 1, 2]}
    assert sorted(read_json(place.data / "02_intermediate" / "import.json")) == ["Partition_01", "Partition_02"]
    assert (place.raw / "Partition_02" / "masks" / "FeTS2022_00002.nii.gz").is_file()


def test_what_was_left_out_is_named_and_demonstration_sites_are_not_forgotten(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()
    source = polyps(tmp_path / "polyps", 5)
    (source / "Kvasir-SEG" / "masks" / "p3.jpg").unlink()
    (place.raw / "harbour_ct" / "images").mkdir(parents=True)

    done = place.run("import_sites", f"importer=polyps,source={source},preprocessing.on_bad_sample=quarantine")

    assert done.code == 0, done.output
    assert "Kvasir-SEG: Kvasir-SEG/images/p3.jpg: no mask as" in done.words
    assert "the demonstration sites harbour_ct are there too" in done.words


def without_masks(source: Path, count: int) -> Path:
    for number in range(count):
        (source / "Kvasir-SEG" / "masks" / f"p{number}.jpg").unlink()
    return source


def test_a_refused_import_lists_each_file_and_keeps_the_demonstration_away(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()
    source = without_masks(polyps(tmp_path / "polyps", 12), 8)

    refused = place.run("import_sites", f"importer=polyps,source={source}")
    training = place.run("federated_training")

    assert (refused.code, training.code) == (1, 1)
    assert refused.words.count("no mask as") == 1
    assert (
        "8 files (Kvasir-SEG/images/p0.jpg, Kvasir-SEG/images/p1.jpg, Kvasir-SEG/images/p2.jpg, ...)" in refused.words
    )
    assert "(each file: Kvasir-SEG in 02_intermediate/import.json)" in refused.words
    listed = read_json(place.data / "02_intermediate" / "import.json")["Kvasir-SEG"]["broken"]
    assert [entry["file"] for entry in listed] == [f"Kvasir-SEG/images/p{number}.jpg" for number in range(8)]
    assert "no site of your own, though an import was tried" in training.words
    assert "Traceback" not in refused.output + training.output
    assert not list(place.raw.glob("[!.]*"))


def test_what_was_left_out_of_an_import_for_one_fault_is_printed_once(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()
    source = without_masks(polyps(tmp_path / "polyps", 12), 8)

    done = place.run("import_sites", f"importer=polyps,source={source},preprocessing.on_bad_sample=quarantine")

    assert done.code == 0, done.output
    assert done.words.count("no mask as") == 1
    assert "Kvasir-SEG: 8 files (Kvasir-SEG/images/p0.jpg," in done.words
    assert "each file is listed in 02_intermediate/import.json" in done.words
    assert len(read_json(place.data / "02_intermediate" / "import.json")["Kvasir-SEG"]["broken"]) == 8


def test_who_has_set_an_import_gets_the_demonstration_only_if_asked_for(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()
    few = "demo_sites.images_per_site=4,preprocessing.min_images=3"

    refused = place.run("demo_sites", f"{few},source={tmp_path}")
    made = place.run("demo_sites", f"{few},source={tmp_path},demo_sites.anyway=true")
    used = place.run("demo_sites", f"{few}")
    again = place.run("federated_training", f"{few},importer=polyps")

    assert (refused.code, made.code, used.code, again.code) == (1, 0, 0, 1), made.output
    assert "no site of your own, though source set" in refused.words
    assert "demo_sites.anyway=true" in refused.words
    assert "were created" in made.words
    assert "are used" in used.words
    assert "no site of your own, though importer set" in again.words


def test_a_folder_of_a_pacs_comes_by_the_same_command(new_workplace, tmp_path: Path, dicom_files) -> None:
    place = new_workplace()
    affine, labels = np.diag([-1.0, -1.0, 2.0, 1.0]), np.zeros((3, 8, 8, 1), np.uint8)
    labels[1, 2:6, 2:6] = 1
    for number in range(5):
        slices = dicom_files.slices(np.full((8, 8, 3), number, np.int16), affine, PatientID=f"4711{number}")
        dicom_files.series(tmp_path / "export" / f"Meier Erna {number}", slices)
        dicom_files.segmentation(tmp_path / "export" / f"seg {number}", slices, labels)

    done = place.run("import_sites", f"importer=dicom,source={tmp_path / 'export'},import_options.site=clinic")
    report = place.run("data_report", "data_report.embedding=false")

    assert (done.code, report.code) == (0, 0), done.output + report.output
    assert "clinic: 5 images of 5 subjects, 0 broken" in done.words
    written = [
        path for path in place.data.rglob("*") if path.is_file() and not path.is_relative_to(place.data / "private")
    ]
    for path in written:
        assert b"Erna" not in path.read_bytes()
    assert "Erna" not in done.output + report.output


def test_a_folder_of_a_pacs_with_nifti_masks_comes_by_the_same_command(
    new_workplace, tmp_path: Path, dicom_files
) -> None:
    place = new_workplace()
    affine, mask = np.diag([-1.0, -1.0, 2.0, 1.0]), np.zeros((8, 8, 3), np.uint8)
    mask[2:6, 2:6, 1] = 1
    for number in range(6):
        slices = dicom_files.slices(np.full((8, 8, 3), number, np.int16), affine, PatientID=f"4711{number}")
        dicom_files.series(tmp_path / "export" / f"Erna {number}", slices)
        nibabel.save(nibabel.Nifti1Image(mask, affine), tmp_path / "export" / f"Erna {number}.nii.gz")

    options = "import_options.site=clinic,import_options.segments=Liver"
    done = place.run("import_sites", f"importer=dicom,source={tmp_path / 'export'},{options}")
    prepared = place.run("preprocessing")

    assert (done.code, prepared.code) == (0, 0), done.output + prepared.output
    assert "clinic: 6 images of 6 subjects, 0 broken" in done.words
    assert "Classes: 1 Liver" in done.words
    assert "Erna" not in done.output + prepared.output
    found = read_json(place.data / "02_intermediate" / "import.json")["clinic"]["pixels"]
    assert found == {"background": 6 * (8 * 8 * 3 - 16), "Liver": 6 * 16}


def test_looking_at_the_headers_of_a_pacs_shows_how_far_it_is(new_workplace, tmp_path: Path, dicom_files) -> None:
    slices = dicom_files.slices(np.zeros((8, 8, 3), np.int16), np.eye(4))
    dicom_files.series(tmp_path / "export", slices)

    terminal = {"FORCE_COLOR": "1", "COLUMNS": "120"}
    params = f"importer=dicom,source={tmp_path / 'export'}"
    refused = new_workplace().run("import_sites", params, environment=terminal, cold=True)

    assert refused.code == 1
    assert "reading headers" in refused.output
    assert "100%" in refused.output


def test_what_is_missing_or_wrong_is_said_without_a_traceback(new_workplace, tmp_path: Path) -> None:
    place = new_workplace()

    nothing = place.run("import_sites")
    unknown = place.run("import_sites", f"importer=kvasir,source={tmp_path}")

    assert (nothing.code, unknown.code) == (1, 1)
    assert "importer: not named" in nothing.words
    assert "importer: unknown 'kvasir'" in unknown.words
    assert "Traceback" not in nothing.output + unknown.output
