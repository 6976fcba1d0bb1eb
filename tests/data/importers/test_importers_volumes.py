"""Published layouts of volumes in tiny trees of their exact form, and how they are written."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from importing import import_sites

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.importers import find_importer
from fedsca_pipeline.data.importers.layouts.fets2022 import MODALITIES
from fedsca_pipeline.data.importers.tables import listed_file
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data.readers.volumes import read_volume, read_volume_mask
from fedsca_pipeline.errors import ConfigError, DataError

SHAPE = (6, 5, 4)
# Not along the axes, so that a transposed or dropped affine shows.
AFFINE = np.array([[0.0, 1.5, 0.0, -3.0], [0.9, 0.0, 0.1, 7.0], [0.0, 0.0, 2.5, 1.0], [0.0, 0.0, 0.0, 1.0]])
Imported = Callable[..., dict[str, dict]]


def volume(seed: int, dtype: type = np.int16, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-900, 900, shape).astype(dtype)


def labelled(*values: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Voxels of 0 and each of the values in turn."""
    return np.resize(np.array([0, *values], np.uint8), shape)


def tree(root: Path, files: Mapping[str, np.ndarray], affine: np.ndarray = AFFINE) -> Path:
    for name, voxels in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), root / name)
    return root


@pytest.fixture
def imported(tmp_path: Path) -> Imported:
    """Imports a tree into ``tmp_path / raw``."""

    def run(name: str, source: Path, options: Mapping[str, str] | None = None, **more) -> dict[str, dict]:
        return import_sites(tmp_path / "raw", find_importer(name, source, options or {}), source, **more)

    return run


def stored(raw: Path, site: str) -> dict[str, tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]]:
    """Return image and mask by stem; the mask is uint8 on the image's grid."""
    pairs = {}
    for path in sorted((raw / site / "images").iterdir()):
        image, mask = nibabel.load(path), nibabel.load(raw / site / "masks" / path.name)
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, image.affine)
        pairs[path.name.removesuffix(".nii.gz")] = image, mask
    assert len(pairs) == len(list((raw / site / "masks").iterdir()))
    return pairs


class TestProstate:
    def test_either_spelling_of_the_masks_is_read_and_both_zones_are_prostate(self, imported, tmp_path) -> None:
        files = {
            "BMC/Case00.nii.gz": volume(0),
            "BMC/Case00_Segmentation.nii.gz": labelled(1, 2),
            "RUNMC/Case00.nii.gz": volume(1),
            "RUNMC/Case00_segmentation.nii.gz": labelled(1),
            "RUNMC/Case01.nii.gz": volume(2),
            "RUNMC/Case01_segmentation.nii.gz": labelled(2).astype(np.float64),
        }

        summary = imported("prostate_saml", tree(tmp_path / "Prostate", files))

        assert {site: found["subjects"] for site, found in summary.items()} == {"BMC": 1, "RUNMC": 2}
        # Every site numbers its own cases: those of one number are different patients.
        subjects = [
            set(yaml.safe_load((tmp_path / "raw" / site / "site.yml").read_text())["subjects"].values())
            for site in ("BMC", "RUNMC")
        ]
        assert subjects[0].isdisjoint(subjects[1])
        np.testing.assert_array_equal(stored(tmp_path / "raw", "BMC")["Case00"][1].dataobj, labelled(1, 2) > 0)
        image, mask = stored(tmp_path / "raw", "RUNMC")["Case01"]
        np.testing.assert_array_equal(mask.dataobj, labelled(2) > 0)
        np.testing.assert_array_equal(image.dataobj, files["RUNMC/Case01.nii.gz"])

    def test_images_are_the_same_files(self, imported, tmp_path) -> None:
        files = {"HK/Case00.nii.gz": volume(0), "HK/Case00_segmentation.nii.gz": labelled(1)}
        source = tree(tmp_path / "Prostate", files)

        imported("prostate_saml", source)

        written = tmp_path / "raw" / "HK" / "images" / "Case00.nii.gz"
        assert written.read_bytes() == (source / "HK" / "Case00.nii.gz").read_bytes()

    def test_a_mask_on_another_grid_is_broken(self, imported, tmp_path) -> None:
        source = tree(tmp_path / "Prostate", {"HK/Case00.nii.gz": volume(0)})
        moved = AFFINE + np.array([[0.0, 0.0, 0.0, 3.0]] * 3 + [[0.0] * 4])
        tree(source, {"HK/Case00_segmentation.nii.gz": labelled(1)}, affine=moved)

        with pytest.raises(DataError, match=r"Case00_segmentation\.nii\.gz: lies elsewhere than its image"):
            imported("prostate_saml", source)


class TestFeTS:
    def source(self, root: Path, *subjects: str, dtype: type = np.int16) -> Path:
        for number, subject in enumerate(subjects):
            files = {
                f"{subject}/{subject}_{modality}.nii.gz": volume(10 * number + place, dtype)
                for place, modality in enumerate(MODALITIES)
            }
            tree(root, {**files, f"{subject}/{subject}_seg.nii.gz": labelled(1, 2, 4)})
        (root / "partitioning_1.csv").write_text(
            "Partition_ID,Subject_ID\n" + "".join(f"{row},{subject}\n" for row, subject in enumerate(subjects, 1))
        )
        (root / "partitioning_2.csv").write_text(
            "Partition_ID,Subject_ID\n" + "".join(f"12,{subject}\n" for subject in subjects)
        )
        return root

    @pytest.mark.parametrize("dtype", [np.int16, np.float32, np.float64])
    def test_the_modalities_are_stacked_in_their_order_and_in_their_type(self, imported, tmp_path, dtype) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000", dtype=dtype)

        summary = imported("fets2022", source)

        image, mask = stored(tmp_path / "raw", "Partition_01")["FeTS2022_00000"]
        assert image.get_data_dtype() == dtype
        np.testing.assert_array_equal(image.affine, AFFINE.astype(np.float32))
        for place in range(4):
            np.testing.assert_array_equal(image.dataobj[..., place], volume(place, dtype))
        np.testing.assert_array_equal(mask.dataobj, np.array([0, 1, 2, 0, 3])[labelled(1, 2, 4)])
        assert list(summary["Partition_01"]["pixels"]) == [
            "background",
            "necrotic core",
            "oedema",
            "enhancing tumour",
        ]

    def test_either_table_of_partitions_can_be_chosen(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000", "FeTS2022_00002")

        assert sorted(imported("fets2022", source)) == ["Partition_01", "Partition_02"]
        assert imported("fets2022", source, {"partitioning": "2"})["Partition_12"]["subjects"] == 2
        with pytest.raises(ConfigError, match=r"import_options\.partitioning: '3' is none of 1, 2"):
            imported("fets2022", source, {"partitioning": "3"})

    def test_a_subject_without_row_or_modality_is_named(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000", "FeTS2022_00002", "FeTS2022_00003")
        (source / "FeTS2022_00000" / "FeTS2022_00000_t2.nii.gz").unlink()
        (source / "partitioning_1.csv").write_text("Partition_ID,Subject_ID\n1,FeTS2022_00000\n1,FeTS2022_00003\n")

        summary = imported("fets2022", source, quarantine=True)

        reasons = {entry["file"]: entry["reason"] for site in summary.values() for entry in site["broken"]}
        assert reasons == {
            "FeTS2022_00000/FeTS2022_00000_t1.nii.gz": "a modality is missing (FeTS2022_00000_t2.nii.gz)",
            "FeTS2022_00002/FeTS2022_00002_t1.nii.gz": "partitioning_1.csv does not name it",
        }
        assert summary["Partition_01"]["images"] == 1

    def test_modalities_on_two_grids_are_broken(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000")
        tree(source, {"FeTS2022_00000/FeTS2022_00000_t2.nii.gz": volume(0, shape=(6, 5, 3))})

        with pytest.raises(DataError, match=r"_t2\.nii\.gz: is 6 x 5 x 3 voxels, its image is 6 x 5 x 4"):
            imported("fets2022", source)

    def test_names_in_the_table_open_no_file(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000")
        (source / "partitioning_1.csv").write_text("Partition_ID,Subject_ID\n../../out,FeTS2022_00000\n2,../secret\n")

        assert list(imported("fets2022", source)) == ["Partition_-out"]
        assert {path.name for path in (tmp_path / "raw").iterdir()} == {"Partition_-out"}

    def test_a_table_that_is_a_link_out_of_the_source_is_refused(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000")
        (source / "partitioning_1.csv").rename(tmp_path / "table.csv")
        (source / "partitioning_1.csv").symlink_to(tmp_path / "table.csv")

        with pytest.raises(DataError, match=r"partitioning_1\.csv: a link that leads out of the source"):
            imported("fets2022", source)

    def test_two_tables_of_one_name_are_refused(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000")
        (source / "FeTS2022_00000" / "partitioning_1.csv").write_text("Partition_ID,Subject_ID\n2,FeTS2022_00000\n")

        with pytest.raises(DataError, match=r"2 files partitioning_1\.csv .*unpack the whole data set"):
            imported("fets2022", source)

    def test_a_damaged_modality_is_named_with_its_file(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "fets", "FeTS2022_00000")
        damaged = source / "FeTS2022_00000" / "FeTS2022_00000_flair.nii.gz"
        damaged.write_bytes(damaged.read_bytes()[:200])

        with pytest.raises(DataError, match=r"FeTS2022_00000_flair\.nii\.gz: cannot be read"):
            imported("fets2022", source)


class TestMnMs:
    def source(self, root: Path) -> Path:
        film, masks = volume(0, shape=(*SHAPE, 3)), labelled(1, 2, 3, shape=(*SHAPE, 3))
        folders = {"Training/Labeled": "A0S9V9", "Training/Unlabeled": "B1A2C3", "Testing": "A1K2P5"}
        for folder, code in folders.items():
            place = f"{folder}/{code}/{code}"
            tree(root, {f"{place}_sa.nii.gz": film, f"{place}_sa_gt.nii.gz": masks})
        (root / "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv").write_text(
            ",External code,VendorName,Vendor,Centre,ED,ES,Age\n"
            "0,A0S9V9,Siemens,A,1,2,0,40\n1,B1A2C3,GE,C,4,0,1,40\n2,A1K2P5,Canon,D,5,1,2,40\n"
        )
        return root

    def test_the_two_labelled_frames_become_volumes_of_one_subject(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "OpenDataset")

        summary = imported("mnms", source)

        assert {site: (found["images"], found["subjects"]) for site, found in summary.items()} == {
            "Centre_1": (2, 1),
            "Centre_5": (2, 1),
        }
        image, mask = stored(tmp_path / "raw", "Centre_1")["A0S9V9_ED"]
        assert image.get_data_dtype() == np.int16
        np.testing.assert_array_equal(image.affine, AFFINE.astype(np.float32))
        np.testing.assert_array_equal(image.dataobj, volume(0, shape=(*SHAPE, 3))[..., 2])
        np.testing.assert_array_equal(mask.dataobj, labelled(1, 2, 3, shape=(*SHAPE, 3))[..., 2])

    def test_a_site_may_be_a_vendor(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "OpenDataset")

        assert sorted(imported("mnms", source, {"site": "vendor"})) == ["Vendor_A", "Vendor_D"]
        with pytest.raises(ConfigError, match=r"import_options\.site: 'scanner' is none of centre, vendor"):
            imported("mnms", source, {"site": "scanner"})

    def test_a_frame_that_the_film_does_not_have_is_broken(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "OpenDataset")
        table = next(source.glob("*.csv"))
        table.write_text(table.read_text().replace("1,2,0,40", "1,9,0,40"))

        with pytest.raises(DataError, match=r"A0S9V9_sa\.nii\.gz: its shape is \(6, 5, 4, 3\).*has a frame 9"):
            imported("mnms", source)

    def test_an_empty_row_of_an_unlabelled_study_does_no_harm(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "OpenDataset")
        table = next(source.glob("*.csv"))
        table.write_text(table.read_text().replace("B1A2C3,GE,C,4,0,1,40", "B1A2C3,GE,C,4,,"))

        assert len(imported("mnms", source)) == 2

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (("Centre", "Center"), "no column 'Centre'"),
            (("A0S9V9,Siemens,A,1,2", "A0S9V9,Siemens,A,1,-2"), "has no Centre and frame ED of it"),
            (("A0S9V9,Siemens,A,1", "A0S9V9,Siemens,A,"), "has no Centre and frame ED of it"),
            (("A0S9V9", "A0S9V8"), "has no Centre and frame ED of it"),
            (("B1A2C3", "A0S9V9"), "External code 'A0S9V9' occurs twice"),
        ],
    )
    def test_a_table_that_cannot_be_used_is_named(self, imported, tmp_path, change, said: str) -> None:
        source = self.source(tmp_path / "OpenDataset")
        table = next(source.glob("*.csv"))
        table.write_text(table.read_text().replace(*change))

        with pytest.raises(DataError, match=said):
            imported("mnms", source)


class TestDecathlon:
    def source(self, root: Path, **keys) -> Path:
        tree(
            root,
            {
                "imagesTr/north_01.nii.gz": volume(0, shape=(*SHAPE, 2)),
                "labelsTr/north_01.nii.gz": labelled(1, 2),
                "imagesTr/south_01.nii.gz": volume(1, np.float32, shape=(*SHAPE, 2)),
                "labelsTr/south_01.nii.gz": labelled(2),
                "imagesTs/north_02.nii.gz": volume(2, shape=(*SHAPE, 2)),
            },
        )
        task = {
            "name": "Prostate",
            "licence": "CC-BY-SA 4.0",
            "modality": {"0": "T2", "1": "ADC"},
            "labels": {"0": "background", "1": "PZ", "2": "TZ"},
            "numTraining": 2,
            "training": [
                {"image": f"./imagesTr/{stem}.nii.gz", "label": f"./labelsTr/{stem}.nii.gz"}
                for stem in ("north_01", "south_01")
            ],
            "test": ["./imagesTs/north_02.nii.gz"],
        }
        (root / "dataset.json").write_text(json.dumps(task | keys))
        return root

    def test_a_task_is_one_site_with_the_classes_of_its_list(self, imported, tmp_path) -> None:
        summary = imported("decathlon", self.source(tmp_path / "Task05_Prostate"))

        assert list(summary["Prostate"]["pixels"]) == ["background", "PZ", "TZ"]
        pairs = stored(tmp_path / "raw", "Prostate")
        assert sorted(pairs) == ["north_01", "south_01"]
        assert pairs["north_01"][0].shape == (*SHAPE, 2)
        np.testing.assert_array_equal(pairs["north_01"][1].dataobj, labelled(1, 2))
        site_file = yaml.safe_load((tmp_path / "raw" / "Prostate" / "site.yml").read_text())
        assert site_file["notes"] == "Prostate. Classes: 1 PZ, 2 TZ. Terms: CC-BY-SA 4.0"

    def test_sites_and_subjects_may_be_told_by_the_stem(self, imported, tmp_path) -> None:
        options = {"site": "^([a-z]+)_", "subject": "_([0-9]+)$"}

        assert sorted(imported("decathlon", self.source(tmp_path / "task"), options)) == ["north", "south"]

        subjects = yaml.safe_load((tmp_path / "raw" / "north" / "site.yml").read_text())["subjects"]
        assert subjects == {"north_01": "01"}

    @pytest.mark.parametrize("name", ["../secret.nii.gz", "/etc/passwd", "imagesTr/../../secret.nii.gz", "C:\\x.nii"])
    def test_a_list_that_leads_out_of_the_source_is_refused(self, imported, tmp_path, name: str) -> None:
        tree(tmp_path, {"secret.nii.gz": volume(3)})
        source = self.source(tmp_path / "task", training=[{"image": name, "label": "./labelsTr/north_01.nii.gz"}])

        with pytest.raises(DataError, match=r"dataset\.json: names .*only files below it are read"):
            imported("decathlon", source)
        assert not any((tmp_path / "raw").rglob("*.nii.gz"))

    def test_a_listed_link_out_of_the_source_is_not_followed(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "task")
        tree(tmp_path, {"secret.nii.gz": volume(3)})
        (source / "imagesTr" / "north_01.nii.gz").unlink()
        (source / "imagesTr" / "north_01.nii.gz").symlink_to(tmp_path / "secret.nii.gz")

        with pytest.raises(DataError, match="a link that leads out of the source"):
            imported("decathlon", source)

    def test_a_listed_file_that_is_not_there_is_named(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "task")
        (source / "labelsTr" / "north_01.nii.gz").unlink()

        with pytest.raises(DataError, match=r"dataset\.json lists a missing file \(north_01\.nii\.gz\)"):
            imported("decathlon", source)

    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ({"training": []}, "not a dataset.json of the Decathlon .training"),
            ({"labels": {"background": 0, "lung": 1}}, "not a dataset.json of the Decathlon .labels"),
        ],
    )
    def test_another_kind_of_list_is_refused(self, tmp_path, keys, said: str) -> None:
        with pytest.raises(DataError, match=said):
            find_importer("decathlon", self.source(tmp_path / "task", **keys), {})

    @pytest.mark.parametrize(
        ("rule", "error", "said"),
        [
            ("(", ConfigError, "not a regular expression"),
            ("north", ConfigError, "has 0 groups"),
            ("^(east)", DataError, "finds nothing in 'north_01'"),
        ],
    )
    def test_a_wrong_rule_for_sites_is_named(self, imported, tmp_path, rule: str, error, said: str) -> None:
        with pytest.raises(error, match=rf"import_options\.site.*{said}"):
            imported("decathlon", self.source(tmp_path / "task"), {"site": rule})


class TestBidsByFolders:
    LAYOUT: Mapping = {
        "patterns": [
            {
                "images": f"{{subject}}/{session}anat/{{subject}}{name}_T1w.nii.gz",
                "masks": f"derivatives/*/{{subject}}/{session}anat/{{subject}}{name}_*mask.nii.gz",
                "stem": f"{{subject}}{name}",
                "subject": "{subject}",
                "site": "all",
            }
            for session, name in (("ses-{session}/", "_ses-{session}"), ("", ""))
        ],
        "table": {"file": "participants.tsv", "key": "participant_id", "site": "site"},
        "classes": ["lesion"],
    }

    def source(self, root: Path, layout: Mapping | None = None) -> Path:
        tree(
            root,
            {
                "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz": volume(0),
                "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz": volume(1),
                "sub-02/anat/sub-02_T1w.nii.gz": volume(2),
                "derivatives/lesions/sub-01/ses-1/anat/sub-01_ses-1_label-L_mask.nii.gz": labelled(1),
                "derivatives/lesions/sub-01/ses-2/anat/sub-01_ses-2_label-L_mask.nii.gz": labelled(1),
                "derivatives/lesions/sub-02/anat/sub-02_label-L_mask.nii.gz": labelled(255),
            },
        )
        (root / "participants.tsv").write_text("participant_id\tage\tsite\nsub-01\t40\tKiel\nsub-02\tn/a\tLund\n")
        (root / "import.yml").write_text(yaml.safe_dump(layout or dict(self.LAYOUT)))
        return root

    def test_sites_come_from_the_participants_and_sessions_share_a_subject(self, imported, tmp_path) -> None:
        summary = imported("folders", self.source(tmp_path / "bids"))

        assert {site: (found["images"], found["subjects"]) for site, found in summary.items()} == {
            "Kiel": (2, 1),
            "Lund": (1, 1),
        }
        np.testing.assert_array_equal(stored(tmp_path / "raw", "Lund")["sub-02"][1].dataobj, labelled(1))

    def test_a_participant_without_site_is_broken(self, imported, tmp_path) -> None:
        source = self.source(tmp_path / "bids")
        (source / "participants.tsv").write_text("participant_id\tsite\nsub-01\tn/a\n")

        with pytest.raises(
            DataError, match=r"3 files alike \(sub-01.*sub-02_T1w.*no site for its subject \('sub-01'\)"
        ):
            imported("folders", source)

    def test_the_table_lies_in_the_source(self, imported, tmp_path) -> None:
        layout = dict(self.LAYOUT) | {"table": {"file": "../participants.tsv", "key": "participant_id", "site": "site"}}

        with pytest.raises(DataError, match=r"names '\.\./participants\.tsv', which leads out of its folder"):
            imported("folders", self.source(tmp_path / "bids", layout))

    def test_several_values_need_a_word_on_what_they_are(self, imported, tmp_path) -> None:
        source = tree(
            self.source(tmp_path / "bids"),
            {"derivatives/lesions/sub-02/anat/sub-02_label-L_mask.nii.gz": labelled(1, 2)},
        )

        with pytest.raises(
            DataError, match="mask values 1, 2 where one beside 0 was expected; name their classes by values"
        ):
            imported("folders", source)


def test_what_is_written_can_be_read_as_a_site_s_volume(imported, tmp_path) -> None:
    source = TestFeTS().source(tmp_path / "fets", "FeTS2022_00000")

    imported("fets2022", source)

    folder = tmp_path / "raw" / "Partition_01"
    image = read_volume(folder / "images" / "FeTS2022_00000.nii.gz")
    assert image.voxels.shape == (*SHAPE, 4)
    mask = read_volume_mask(folder / "masks" / "FeTS2022_00000.nii.gz", image)
    assert np.unique(mask).tolist() == [0, 1, 2, 3]


@given(name=st.text(alphabet="ab./\\:~ C", max_size=12))
def test_no_name_of_a_list_leads_out_of_its_folder(name: str) -> None:
    folder = Path("/data/task")

    try:
        found = listed_file(folder / "dataset.json", name)
    except DataError:
        return

    assert found.resolve().is_relative_to(folder)


def test_imported_volumes_can_be_prepared(imported, tmp_path) -> None:
    shape = (24, 20, 6)
    files = {}
    for case in range(6):
        files[f"HK/Case{case:02d}.nii.gz"] = volume(case, shape=shape)
        files[f"HK/Case{case:02d}_segmentation.nii.gz"] = labelled(1, 2, shape=shape)

    imported("prostate_saml", tree(tmp_path / "source", files))

    prepared = prepare_site(tmp_path / "raw", "HK", PreprocessingConfig(image_size=32), seed=0)
    assert prepared.manifest["subject"].nunique() == 6
    assert prepared.report["broken"] == []


def test_one_volume_at_a_time_is_in_memory(imported, tmp_path) -> None:
    shape = (64, 64, 32)

    def peak(cases: int) -> int:
        name = f"site{cases}"
        files = {f"{name}/Case{case:02d}.nii.gz": volume(case, np.float32, shape) for case in range(cases)}
        masks = {f"{name}/Case{case:02d}_segmentation.nii.gz": labelled(1, shape=shape) for case in range(cases)}
        source = tree(tmp_path / name, files | masks)
        tracemalloc.start()
        imported("prostate_saml", source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(1)  # what is imported on the way counts for none
    assert peak(8) < 1.5 * peak(2)


@pytest.mark.parametrize("importer", ["prostate_saml", "site_folder"])
def test_a_header_that_contradicts_itself_is_told_by_the_import(
    tmp_path: Path, imported: Imported, importer: str
) -> None:
    names = {
        "prostate_saml": ("RUNMC/Case00.nii.gz", "RUNMC/Case00_segmentation.nii.gz"),
        "site_folder": ("images/a.nii.gz", "masks/a.nii.gz"),
    }[importer]
    source = tree(tmp_path / "source", {names[0]: volume(0), names[1]: labelled(1)}, np.diag([1.5, 1.5, 2.0, 1.0]))
    stated = nibabel.load(source / names[0])
    stated.header.set_zooms((1.0, 1.0, 1.0))
    stated.to_filename(tmp_path / "again.nii.gz")
    (source / names[0]).write_bytes((tmp_path / "again.nii.gz").read_bytes())

    (site,) = imported(importer, source).values()

    (alert,) = site["alerts"]
    assert (
        "1.5 x 1.5 x 2 mm by its sform, which is used for slices and metrics, and 1 x 1 x 1 mm by its pixdim" in alert
    )
