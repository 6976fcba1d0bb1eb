"""Each published layout in a tiny tree of its exact form, and what an import refuses."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from importing import import_sites
from PIL import Image

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.importers import find_importer, importer_names
from fedsca_pipeline.data.importers.layout import match_files
from fedsca_pipeline.data.importers.layouts.dsb2018 import acquisition
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data.site_folder.discovery import discover_sites
from fedsca_pipeline.errors import ConfigError, DataError

SIZE = (12, 16)
HALF = np.zeros(SIZE, np.uint8)
HALF[:, 8:] = 1
Imported = Callable[..., dict[str, dict]]


def photograph(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8))


def tree(root: Path, files: Mapping[str, Image.Image]) -> Path:
    for name, image in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def two_valued(high: int = 255) -> Image.Image:
    return Image.fromarray(HALF * np.uint8(high))


def palette_of(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


@pytest.fixture
def imported(tmp_path: Path) -> Imported:
    """Imports a tree into ``tmp_path / raw``."""

    def run(name: str, source: Path, options: Mapping[str, str] | None = None, **more) -> dict[str, dict]:
        return import_sites(tmp_path / "raw", find_importer(name, source, options or {}), source, **more)

    return run


def stored(raw: Path, site: str) -> tuple[dict[str, np.ndarray], dict]:
    """Return the masks by stem and the site file; every mask has its image."""
    masks = {path.stem: np.array(Image.open(path)) for path in (raw / site / "masks").iterdir()}
    assert {path.stem for path in (raw / site / "images").iterdir()} == set(masks)
    return masks, yaml.safe_load((raw / site / "site.yml").read_text())


class TestLayouts:
    def test_dsb2018_joins_the_nuclei_and_tells_the_acquisition_groups_apart(self, imported, tmp_path) -> None:
        first, second = HALF.copy(), np.zeros_like(HALF)
        second[:3, :3] = 1
        dark, bright = np.full(SIZE, 10, np.uint8), np.full((*SIZE, 3), (160, 110, 190), np.uint8)
        source = tree(
            tmp_path / "dsb",
            {
                "stage1_train/aa/images/aa.png": Image.fromarray(dark),
                "stage1_train/aa/masks/1.png": Image.fromarray(first * np.uint8(255)),
                "stage1_train/aa/masks/2.png": Image.fromarray(second * np.uint8(255)),
                "stage1_train/bb/images/bb.png": Image.fromarray(bright),
                "stage1_train/bb/masks/1.png": two_valued(),
            },
        )

        summary = imported("dsb2018", source)

        assert sorted(summary) == ["fluo_16", "tissue_violet_16"]
        masks, _ = stored(tmp_path / "raw", "fluo_16")
        np.testing.assert_array_equal(masks["aa"], first | second)

    def test_polyps_take_jpeg_masks_by_half_their_range(self, imported, tmp_path) -> None:
        source = tmp_path / "polyps"
        tree(source, {"Kvasir-SEG/images/x1.jpg": photograph(), "CVC-300/images/149.png": photograph(1)})
        tree(source, {"Kvasir-SEG/masks/x1.jpg": two_valued(), "CVC-300/masks/149.png": two_valued()})
        tree(source, {"CVC-ClinicDB/Original/1.tif": photograph(2), "CVC-ClinicDB/Ground Truth/1.tif": two_valued()})

        imported("polyps", source)

        for site, stem in {"Kvasir-SEG": "x1", "CVC-300": "149", "CVC-ClinicDB": "1"}.items():
            masks, site_file = stored(tmp_path / "raw", site)
            np.testing.assert_array_equal(masks[stem], HALF)
            assert "polyp" in site_file["notes"]

    def test_frames_of_one_sequence_share_a_subject_where_a_table_tells(self, imported, tmp_path) -> None:
        files = {}
        for number in (1, 2, 26):
            files[f"CVC-ClinicDB/PNG/Original/{number}.png"] = photograph(number)
            files[f"CVC-ClinicDB/PNG/Ground Truth/{number}.png"] = two_valued()
        source = tree(tmp_path / "polyps", files)
        (source / "CVC-ClinicDB" / "metadata.csv").write_text(
            "frame_id,sequence_id,png_image_path\n"
            "1,1,PNG/Original/1.png\n2,1,PNG/Original/2.png\n26,2,PNG/Original/26.png\n"
        )

        imported("polyps", source)

        subjects = stored(tmp_path / "raw", "CVC-ClinicDB")[1]["subjects"]
        assert subjects == {"1": "sequence_1", "2": "sequence_1", "26": "sequence_2"}

    def test_vessels_have_both_eyes_under_one_subject(self, imported, tmp_path) -> None:
        source = tree(
            tmp_path / "vessels",
            {
                "DRIVE/training/images/21_training.tif": photograph(),
                "DRIVE/training/1st_manual/21_manual1.gif": two_valued(),
                "DRIVE/test/images/01_test.tif": photograph(1),
                "DRIVE/test/1st_manual/01_manual1.gif": two_valued(),
                "STARE/stare-images/im0001.ppm": photograph(2),
                "STARE/labels-ah/im0001.ah.ppm": two_valued(),
                "CHASE_DB1/Image_01L.jpg": photograph(3),
                "CHASE_DB1/Image_01L_1stHO.png": two_valued().convert("1"),
                "CHASE_DB1/Image_01L_2ndHO.png": two_valued().convert("1"),
                "CHASE_DB1/Image_01R.jpg": photograph(4),
                "CHASE_DB1/Image_01R_1stHO.png": two_valued().convert("1"),
                "CHASE_DB1/Image_02R.jpg": photograph(8),
                "CHASE_DB1/Image_02R_1stHO.png": two_valued().convert("1"),
                "HRF/images/01_dr.JPG": photograph(5),
                "HRF/images/01_h.jpg": photograph(6),
                "HRF/manual1/01_dr.tif": two_valued(),
                "HRF/manual1/01_h.tif": two_valued(),
                "LES-AV/images/3.png": photograph(7),
                "LES-AV/vessel-segmentations/3.png": two_valued(),
            },
        )

        summary = imported("vessels", source)

        counts = {site: (found["images"], found["subjects"]) for site, found in summary.items()}
        assert counts == {"CHASE_DB1": (3, 2), "DRIVE": (2, 2), "HRF": (2, 2), "LES-AV": (1, 1), "STARE": (1, 1)}
        for site in summary:
            for mask in stored(tmp_path / "raw", site)[0].values():
                np.testing.assert_array_equal(mask, HALF)

    def test_chase_may_lie_in_folders_of_images_and_masks(self, imported, tmp_path) -> None:
        files = {"CHASEDB1/Images/Image_14L.jpg": photograph(), "CHASEDB1/Masks/Image_14L_1stHO.png": two_valued()}

        imported("vessels", tree(tmp_path / "chase", files))

        assert stored(tmp_path / "raw", "CHASE_DB1")[1]["subjects"] == {"14L": "14"}

    def test_vessels_as_people_have_them_are_read_and_what_is_passed_over_is_told(
        self, imported, tmp_path, caplog
    ) -> None:
        painted = np.zeros((*SIZE, 3), np.uint8)
        painted[:4, 8:], painted[4:8, 8:], painted[8:, 8:] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
        source = tree(
            tmp_path / "vessels",
            {
                "DRIVE/training/images/21_training.tif": photograph(),
                "DRIVE/training/1st_manual/21_manual1.gif": two_valued(),
                "DRIVE/training/mask/21_training_mask.gif": two_valued(),
                "CHASEDB/Image_01L.jpg": photograph(1),
                "CHASEDB/Image_01L_1stHO.png": two_valued(),
                "CHASEDB/Image_01L_2ndHO.png": two_valued(),
                "CHASEDB/Image_01R.jpg": photograph(2),
                "CHASEDB/Image_01R_1stHO.png": two_valued(),
                "CHASEDB/Image_01R_2ndHO.png": two_valued(),
                "CHASEDB/Image_14L.jpg": photograph(3),
                "CHASEDB/Image_14L_1stHO.png": two_valued(),
                "HRF-AV/training/images/01_h.jpg": photograph(4),
                "HRF-AV/training/1st_manual/01_h_AVmanual.png": Image.fromarray(painted),
                "HRF-AV/test/images/09_dr_AVmanual.png": photograph(5),
                "HRF-AV/test/1st_manual/09_dr_AVmanual.png": Image.fromarray(painted),
                "LES-AV/training/images/3.png": photograph(6),
                "LES-AV/training/1st_manual/3.png": two_valued(),
                "LES-AV/test/images/401.png": photograph(7),
                "LES-AV/test/1st_manual/401.png": Image.fromarray(painted),
            },
        )

        summary = imported("vessels", source)

        counts = {site: (found["images"], found["subjects"]) for site, found in summary.items()}
        assert counts == {"CHASE_DB1": (3, 2), "DRIVE": (1, 1), "HRF-AV": (2, 2), "LES-AV": (2, 2)}
        assert stored(tmp_path / "raw", "CHASE_DB1")[1]["subjects"] == {"01L": "01", "01R": "01", "14L": "14"}
        assert set(stored(tmp_path / "raw", "HRF-AV")[0]) == {"01_h", "09_dr"}
        for site in summary:
            for mask in stored(tmp_path / "raw", site)[0].values():
                np.testing.assert_array_equal(mask, HALF)
        assert caplog.messages == [
            "passed over: CHASEDB: 2 image files, such as Image_01L_2ndHO.png",
            "passed over: DRIVE/training/mask: 1 image file, such as 21_training_mask.gif",
        ]

    @pytest.mark.parametrize("form", ["grey", "palette", "rgb"])
    def test_fundus_dofe_reads_cup_and_rim_however_they_are_stored(self, imported, tmp_path, form: str) -> None:
        grey = np.full(SIZE, 255, np.uint8)
        grey[2:10, 2:10], grey[4:6, 4:6] = 128, 0
        mask = {
            "grey": lambda: Image.fromarray(grey),
            "rgb": lambda: Image.fromarray(grey).convert("RGB"),
            "palette": lambda: palette_of(
                np.select([grey == 255, grey == 128], [0, 1], 2), [(255,) * 3, (128,) * 3, (0,) * 3]
            ),
        }[form]()
        tree(tmp_path / "f", {"Domain1/train/ROIs/image/g1.png": photograph(), "Domain1/train/ROIs/mask/g1.png": mask})

        summary = imported("fundus_dofe", tmp_path / "f")

        masks, _ = stored(tmp_path / "raw", "Domain1")
        np.testing.assert_array_equal(masks["train-g1"], np.select([grey == 0, grey == 128], [2, 1], 0))
        assert summary["Domain1"]["pixels"] == {"background": 128, "rim": 60, "cup": 4}

    def test_busi_joins_the_lesions_of_an_image(self, imported, tmp_path) -> None:
        source = tree(
            tmp_path / "Dataset_BUSI_with_GT",
            {
                "benign/benign (1).png": photograph(),
                "benign/benign (1)_mask.png": two_valued(),
                "benign/benign (1)_mask_1.png": Image.fromarray((1 - HALF) * np.uint8(255)),
                "normal/normal (2).png": photograph(1),
                "normal/normal (2)_mask.png": Image.fromarray(HALF * np.uint8(0)),
            },
        )

        imported("breast_ultrasound", source)

        masks, _ = stored(tmp_path / "raw", "BUSI")
        assert {stem: int(mask.sum()) for stem, mask in masks.items()} == {"benign_1": 192, "normal_2": 0}

    def test_bus_bra_groups_the_views_of_a_case_by_its_table(self, imported, tmp_path) -> None:
        source = tree(
            tmp_path / "BUSBRA",
            {
                "Images/bus_0001-l.png": photograph(),
                "Images/bus_0001-r.png": photograph(1),
                "Images/bus_0003-s.png": photograph(2),
                "Masks/mask_0001-l.png": two_valued(),
                "Masks/mask_0001-r.png": two_valued(),
                "Masks/mask_0003-s.png": two_valued(),
            },
        )
        (source / "bus_data.csv").write_text(
            "ID,Case,Histology,Pathology,BIRADS\nbus_0001-l,1,x,benign,2\nbus_0001-r,1,x,benign,2\n"
        )

        with pytest.raises(DataError, match=r"bus_0003-s\.png: bus_data\.csv has no Case of it \(bus_0003-s\)"):
            imported("breast_ultrasound", source)
        assert imported("breast_ultrasound", source, quarantine=True)["BUS-BRA"]["subjects"] == 1

        assert stored(tmp_path / "raw", "BUS-BRA")[1]["subjects"] == {"bus_0001-l": "1", "bus_0001-r": "1"}

    def test_bus_uclm_has_its_patient_in_the_name_and_either_colour_is_a_lesion(self, imported, tmp_path) -> None:
        painted = np.zeros((*SIZE, 3), np.uint8)
        painted[:2], painted[4:6] = (0, 255, 0), (255, 0, 0)
        source = tree(
            tmp_path / "BUS-UCLM",
            {
                "BUS-UCLM/images/ANFO_000.png": photograph(),
                "BUS-UCLM/images/ANFO_001.png": photograph(1),
                "BUS-UCLM/masks/ANFO_000.png": Image.fromarray(painted),
                "BUS-UCLM/masks/ANFO_001.png": Image.fromarray(painted * np.uint8(0)),
            },
        )

        assert imported("breast_ultrasound", source)["BUS-UCLM"]["subjects"] == 1
        masks, _ = stored(tmp_path / "raw", "BUS-UCLM")
        np.testing.assert_array_equal(masks["ANFO_000"], painted.any(axis=2))
        assert not masks["ANFO_001"].any()

    def test_breast_takes_the_tumours_and_no_other_mask(self, imported, tmp_path) -> None:
        other = Image.fromarray((1 - HALF) * np.uint8(255))
        source = tree(
            tmp_path / "BrEaST-Lesions_USG-images_and_masks",
            {
                "BrEaST-Lesions_USG-images_and_masks/case001.png": photograph(),
                "BrEaST-Lesions_USG-images_and_masks/case001_tumor.png": two_valued(),
                "BrEaST-Lesions_USG-images_and_masks/case001_other1.png": other,
                "BrEaST-Lesions_USG-images_and_masks/case045.png": photograph(1),
            },
        )

        found = imported("breast_ultrasound", source, quarantine=True)["BrEaST"]

        assert (found["images"], [Path(entry["file"]).name for entry in found["broken"]]) == (1, ["case045.png"])
        np.testing.assert_array_equal(stored(tmp_path / "raw", "BrEaST")[0]["case001"], HALF)

    def test_udiat_is_originals_beside_their_ground_truth(self, imported, tmp_path) -> None:
        source = tree(tmp_path / "BUS", {"original/000001.png": photograph(), "GT/000001.png": two_valued()})

        imported("breast_ultrasound", source)

        np.testing.assert_array_equal(stored(tmp_path / "raw", "UDIAT")[0]["000001"], HALF)

    def test_refuge_as_published_is_a_site_a_camera(self, imported, tmp_path) -> None:
        classes = np.zeros(SIZE, np.uint8)
        classes[2:10, 2:10], classes[4:6, 4:6] = 1, 2
        grey = Image.fromarray(np.array([255, 128, 0], np.uint8)[classes])
        source = tree(
            tmp_path / "REFUGE",
            {
                "REFUGE-Training400/Training400/Glaucoma/g0001.jpg": photograph(),
                "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Glaucoma/g0001.bmp": grey,
                "REFUGE-Training400/Training400/Non-Glaucoma/n0001.jpg": photograph(1),
                "Annotation-Training400/Annotation-Training400/Disc_Cup_Masks/Non-Glaucoma/n0001.bmp": grey,
                "REFUGE-Validation400/REFUGE-Validation400/V0001.jpg": photograph(2),
                "REFUGE-Validation400-GT/Disc_Cup_Masks/V0001.bmp": grey.convert("RGB"),
                "REFUGE-Test400/Test400/T0001.jpg": photograph(3),
                "REFUGE-Test-GT/Disc_Cup_Masks/G/T0001.bmp": grey,
            },
        )

        summary = imported("fundus_glaucoma", source)

        assert {site: found["images"] for site, found in summary.items()} == {"REFUGE-Canon": 2, "REFUGE-Zeiss": 2}
        for site in summary:
            for mask in stored(tmp_path / "raw", site)[0].values():
                np.testing.assert_array_equal(mask, classes)

    def test_the_collected_fundus_sets_have_numbered_masks(self, imported, tmp_path) -> None:
        numbers = np.arange(12 * 16, dtype=np.uint8).reshape(SIZE) % 3
        mask = Image.fromarray(numbers)
        source = tree(
            tmp_path / "glaucoma",
            {
                "REFUGE/train/Images/g0001.jpg": photograph(),
                "REFUGE/train/Masks/g0001.png": mask,
                "REFUGE/val/Images/V0001.jpg": photograph(1),
                "REFUGE/val/Masks/V0001.png": mask,
                "ORIGA/Images/001.jpg": photograph(2),
                "ORIGA/Masks/001.png": mask,
                "ORIGA/Images_Square/001.jpg": photograph(3),
                "ORIGA/Masks_Square/001.png": mask,
                "G1020/Images/image_0.jpg": photograph(4),
                "G1020/Masks/image_0.png": mask,
            },
        )
        (source / "G1020" / "Images" / "image_0.json").write_text('{"shapes": []}')

        summary = imported("fundus_glaucoma", source)

        assert {site: found["images"] for site, found in summary.items()} == {
            "G1020": 1,
            "ORIGA": 1,
            "REFUGE-Canon": 1,
            "REFUGE-Zeiss": 1,
        }
        for site in summary:
            for stem_mask in stored(tmp_path / "raw", site)[0].values():
                np.testing.assert_array_equal(stem_mask, numbers)

    def test_origa_and_g1020_as_published_have_matlab_files_and_polygons(self, imported, tmp_path) -> None:
        from scipy.io import savemat

        numbers = np.zeros(SIZE, np.uint8)
        numbers[2:10, 2:10], numbers[4:6, 4:6] = 1, 2
        images = {"ORIGA/ORIGA/Images/001.jpg": photograph(), "G1020/Images/image_0.jpg": photograph(1)}
        source = tree(tmp_path / "fundus", images)
        (source / "ORIGA" / "ORIGA" / "Semi-automatic-annotations").mkdir()
        savemat(source / "ORIGA" / "ORIGA" / "Semi-automatic-annotations" / "001.mat", {"mask": numbers})
        square = {"disc": (2, 9), "cup": (4, 5), "discLoc": (0, 11)}
        shapes = [
            {"label": name, "points": [[low, low], [high, low], [high, high], [low, high]]}
            for name, (low, high) in square.items()
        ]
        (source / "G1020" / "Images" / "image_0.json").write_text(json.dumps({"shapes": shapes}))

        imported("fundus_glaucoma", source)

        np.testing.assert_array_equal(stored(tmp_path / "raw", "ORIGA")[0]["001"], numbers)
        np.testing.assert_array_equal(stored(tmp_path / "raw", "G1020")[0]["image_0"], numbers)

    def test_drishti_takes_the_half_of_both_soft_maps(self, imported, tmp_path) -> None:
        disc, cup = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        disc[2:10, 2:10], disc[0, 0], cup[4:6, 4:6], cup[5, 7] = 191, 64, 255, 128
        source = tree(
            tmp_path / "Drishti-GS1_files",
            {
                "Training/Images/drishtiGS_002.png": photograph(),
                "Training/GT/drishtiGS_002/SoftMap/drishtiGS_002_ODsegSoftmap.png": Image.fromarray(disc),
                "Training/GT/drishtiGS_002/SoftMap/drishtiGS_002_cupsegSoftmap.png": Image.fromarray(cup),
                "Test/Images/glaucoma/drishtiGS_001.png": photograph(1),
                "Test/Test_GT/drishtiGS_001/SoftMap/drishtiGS_001_ODsegSoftmap.png": Image.fromarray(disc),
            },
        )

        found = imported("fundus_glaucoma", source, quarantine=True)["Drishti-GS"]

        assert [entry["reason"] for entry in found["broken"]] == ["its mask *_cupsegSoftmap.png is missing"]
        masks, _ = stored(tmp_path / "raw", "Drishti-GS")
        np.testing.assert_array_equal(masks["drishtiGS_002"], np.where(cup >= 128, 2, disc >= 128))

    def test_monusac_fills_the_outlines_by_class_and_groups_slides_by_patient(self, imported, tmp_path) -> None:
        def outlines(*named: tuple[str, int, int]) -> str:
            return "<Annotations>{}</Annotations>".format(
                "".join(
                    f'<Annotation Id="1"><Attributes><Attribute Name="{name}" Id="0" Value=""/></Attributes><Regions>'
                    f'<RegionAttributeHeaders/><Region Id="1"><Vertices><Vertex X="{low}" Y="{low}" Z="0"/>'
                    f'<Vertex X="{high}" Y="{low}" Z="0"/><Vertex X="{high}" Y="{high}" Z="0"/>'
                    f'<Vertex X="{low}" Y="{high}" Z="0"/></Vertices></Region></Regions></Annotation>'
                    for name, low, high in named
                )
            )

        first, second = "TCGA-2Z-A9JG-01Z-00-DX1", "TCGA-2Z-A9JG-01Z-00-DX2"
        rgba = photograph(1).convert("RGBA")
        source = tree(tmp_path / "MoNuSAC", {f"{first}/{first}_1.tif": photograph(), f"{second}/{second}_1.tif": rgba})
        (source / first / f"{first}_1.svs").write_bytes(b"a slide")
        (source / first / f"{first}_2.svs").write_bytes(b"a slide")
        (source / first / f"{first}_2.xml").write_text(outlines())
        (source / first / f"{first}_1.xml").write_text(outlines(("Epithelial", 1, 4), ("Neutrophil", 4, 6)))
        (source / second / f"{second}_1.xml").write_text(outlines(("Ambiguous", 1, 4), ("Lymphocyte", 8, 9)))

        found = imported("monusac", source, quarantine=True)["MoNuSAC"]

        assert (found["images"], found["subjects"]) == (2, 1)
        assert [(entry["file"], entry["reason"]) for entry in found["broken"]] == [
            (f"{first}/{first}_2.svs", "no reader for .svs")
        ]
        masks, _ = stored(tmp_path / "raw", "MoNuSAC")
        expected = np.zeros(SIZE, np.uint8)
        expected[1:5, 1:5] = 1
        expected[4:7, 4:7] = 4
        np.testing.assert_array_equal(masks[f"{first}_1"], expected)
        assert np.unique(masks[f"{second}_1"]).tolist() == [0, 2]

    def test_pannuke_is_a_site_a_tissue(self, imported, tmp_path) -> None:
        fold = self.pannuke(tmp_path / "pannuke", types=np.array(["Breast", "Bile-duct", "Breast"]))

        summary = imported("pannuke", fold)

        assert {site: found["images"] for site, found in summary.items()} == {"Bile-duct": 1, "Breast": 2}
        masks, _ = stored(tmp_path / "raw", "Breast")
        assert {stem: np.unique(mask).tolist() for stem, mask in masks.items()} == {
            "fold1_0000": [0, 1, 5],
            "fold1_0002": [0, 1, 5],
        }
        picture = np.array(Image.open(tmp_path / "raw" / "Breast" / "images" / "fold1_0002.png"))
        np.testing.assert_array_equal(picture, np.load(fold / "Fold 1/images/fold1/images.npy")[2])

    def test_the_classes_of_any_layout_can_be_merged(self, imported, tmp_path) -> None:
        fold = self.pannuke(tmp_path / "pannuke", types=np.array(["Breast"] * 3))

        summary = imported("pannuke", fold, {"merge": "nucleus"})

        assert list(summary["Breast"]["pixels"]) == ["background", "nucleus"]
        masks, site_file = stored(tmp_path / "raw", "Breast")
        assert np.unique(masks["fold1_0000"]).tolist() == [0, 1]
        assert "Classes: 1 nucleus." in site_file["notes"]
        assert site_file["label_map"] == {0: 0, 1: 1}

    def test_pannuke_unpickles_nothing(self, imported, tmp_path) -> None:
        pickled = self.pannuke(tmp_path / "pannuke", types=np.array(["Breast"] * 3, object))

        with pytest.raises(DataError, match=r"types\.npy: not an array of numbers or text"):
            imported("pannuke", pickled)

    def test_an_array_that_is_a_link_out_of_the_source_is_refused(self, imported, tmp_path) -> None:
        fold = self.pannuke(tmp_path / "pannuke", types=np.array(["Breast"] * 3))
        types = fold / "Fold 1" / "images" / "fold1" / "types.npy"
        types.rename(tmp_path / "types.npy")
        types.symlink_to(tmp_path / "types.npy")

        with pytest.raises(DataError, match=r"types\.npy: a link that leads out of the source"):
            imported("pannuke", fold)

    def test_pannuke_arrays_of_two_folds_are_refused(self, imported, tmp_path) -> None:
        mixed = self.pannuke(tmp_path / "pannuke", types=np.array(["Breast"] * 2))

        with pytest.raises(DataError, match=r"types\.npy: an array of shape \(2,\), beside 3 images"):
            imported("pannuke", mixed)

    def pannuke(self, source: Path, types: np.ndarray) -> Path:
        masks = np.zeros((3, 256, 256, 6))
        masks[:, :9, :9, 0], masks[:, 5:12, 5:12, 4], masks[..., 5] = 7, 3, 1
        arrays = {
            "images/fold1/images.npy": np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3)).astype(float),
            "images/fold1/types.npy": types,
            "masks/fold1/masks.npy": masks,
        }
        for name, array in arrays.items():
            (source / "Fold 1" / name).parent.mkdir(parents=True, exist_ok=True)
            np.save(source / "Fold 1" / name, array)
        return source

    def test_tnbc_has_numbered_nuclei_and_a_patient_a_slide(self, imported, tmp_path) -> None:
        source = tree(
            tmp_path / "TNBC",
            {
                "Slide_01/01_1.png": photograph(),
                "Slide_01/01_2.png": photograph(1),
                "GT_01/01_1.png": two_valued(7),
                "GT_01/01_2.png": two_valued(3),
            },
        )

        assert imported("tnbc", source)["TNBC"]["subjects"] == 1
        np.testing.assert_array_equal(stored(tmp_path / "raw", "TNBC")[0]["01_2"], HALF)


class TestFolders:
    def layout(self, source: Path, **keys) -> Path:
        source.mkdir(parents=True, exist_ok=True)
        (source / "import.yml").write_text(yaml.safe_dump(keys))
        return source

    def test_a_layout_of_one_s_own_with_colours(self, imported, tmp_path) -> None:
        source = self.layout(
            tmp_path / "mine",
            patterns=[
                {
                    "images": "{centre}/scan_{patient}_{view}.png",
                    "masks": "{centre}/seg_{patient}_{view}.png",
                    "site": "site_{centre}",
                    "stem": "{patient}_{view}",
                    "subject": "{patient}",
                }
            ],
            classes=["organ", "lesion"],
            colours={"#00ff00": 1, "#FF0000": 2},
        )
        mask = np.zeros((*SIZE, 3), np.uint8)
        mask[:4], mask[4:6] = (0, 255, 0), (255, 0, 0)
        tree(source, {"a/scan_7_x.png": photograph(), "a/seg_7_x.png": Image.fromarray(mask)})

        imported("folders", source)

        masks, site_file = stored(tmp_path / "raw", "site_a")
        assert np.unique(masks["7_x"]).tolist() == [0, 1, 2]
        assert site_file["subjects"] == {"7_x": "7"}

    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            ({}, "patterns"),
            ({"patterns": [{"images": "{stem}.png"}]}, r"patterns\.0\.masks"),
            (
                {"patterns": [{"images": "{a}", "masks": "m", "site": "x"}]},
                r"stem contains \{stem\}, which images lacks",
            ),
            ({"patterns": [{"images": "i", "masks": "m"}], "colour": {}}, "colour: Extra"),
            ({"patterns": [{"images": "i", "masks": "m"}], "classes": ["a", "b"]}, "several classes need values"),
            ({"patterns": [{"images": "i", "masks": "m"}], "values": {1: 2}}, "class 2, but classes names 1"),
            ({"patterns": [{"images": "i", "masks": "m"}], "colours": {"red": 1}}, "'red' is not a colour"),
        ],
    )
    def test_a_wrong_layout_file_names_file_and_key(self, tmp_path, keys, said: str) -> None:
        source = self.layout(tmp_path / "mine", **keys)

        with pytest.raises(ConfigError, match=said):
            find_importer("folders", source, {})

    def test_without_a_layout_file_the_error_says_where_it_belongs(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"import\.yml: no such file.*import_options\.layout"):
            find_importer("folders", tmp_path, {})

    def test_masks_that_number_objects_are_taken_for_what_they_are_told_to_be(self, imported, tmp_path) -> None:
        patterns = [{"images": "{stem}.tif", "masks": "{stem}_mask.tif", "site": "lab"}]
        numbered = HALF.astype(np.uint16)
        numbered[:5] *= 3
        files = {"a.tif": photograph(), "a_mask.tif": Image.fromarray(numbered)}
        source = tree(self.layout(tmp_path / "mine", patterns=patterns), files)

        with pytest.raises(DataError, match="mask values 1, 3, the largest below half of what its type can hold"):
            imported("folders", source)

        self.layout(source, patterns=patterns, objects=True)
        assert imported("folders", source)["lab"]["pixels"] == {"background": 96, "foreground": 96}

    @pytest.mark.parametrize("key", ["values", "indices"])
    def test_zero_is_background_unless_it_is_named(self, imported, tmp_path, key: str) -> None:
        patterns = [{"images": "{stem}.png", "masks": "{stem}_mask.png", "site": "lab"}]
        numbered = HALF.copy()
        numbered[:5] *= 3
        files = {"a.png": photograph(), "a_mask.png": Image.fromarray(numbered)}
        source = tree(self.layout(tmp_path / "mine", patterns=patterns, **{key: {1: 1, 2: 1, 3: 1}}), files)

        assert imported("folders", source)["lab"]["pixels"] == {"background": 96, "foreground": 96}

        self.layout(source, patterns=[patterns[0] | {"site": "other"}], **{key: {0: 1, 1: 0, 3: 0}})
        assert imported("folders", source)["other"]["pixels"] == {"background": 96, "foreground": 96}

    def test_a_key_twice_is_refused(self, tmp_path) -> None:
        source = self.layout(tmp_path / "mine")
        (source / "import.yml").write_text("classes: [a]\nvalues: {1: 1, 2: 1, 1: 0}\n")

        with pytest.raises(ConfigError, match=r"import\.yml: the key 1 is there twice, the second time in line 2"):
            find_importer("folders", source, {})

    @pytest.mark.parametrize(
        "pattern", ["{child}{eye}.jpg", "{child:d}{eye:d}.jpg", "{child:d}{eye}.jpg", "{eye}*.jpg"]
    )
    @pytest.mark.parametrize("key", ["images", "masks"])
    def test_placeholders_side_by_side_need_types(self, tmp_path, pattern: str, key: str) -> None:
        part = {
            "images": "{child:d}_{eye:w}.jpg",
            "masks": "{child:d}_{eye:w}.png",
            "site": "x",
            "stem": "{child}{eye}",
        }
        source = self.layout(tmp_path / "mine", patterns=[part | {"subject": "{child}", key: pattern}])

        with pytest.raises(ConfigError, match=r"side by side.*\{child:d\} stands for digits, \{eye:w\} for letters"):
            find_importer("folders", source, {})

    def test_a_type_that_does_not_exist_is_refused(self, imported, tmp_path) -> None:
        part = {"images": "{stem:x}.png", "masks": "{stem}_m.png", "site": "x"}
        source = self.layout(tmp_path / "mine", patterns=[part])

        with pytest.raises(ConfigError, match=r"\{stem:x\}: no such type; d stands for digits"):
            imported("folders", source)

    def test_types_split_a_name_between_digits_and_letters(self, imported, tmp_path) -> None:
        part = {"images": "{child:d}{eye:w}.png", "masks": "{child:d}{eye:w}_mask.png"}
        keys = {"site": "eyes", "stem": "{child}{eye}", "subject": "{child}"}
        names = ("01L", "01R", "102L")
        files = {f"{name}.png": photograph() for name in names} | {f"{name}_mask.png": two_valued() for name in names}
        source = tree(self.layout(tmp_path / "mine", patterns=[part | keys]), files)

        assert imported("folders", source)["eyes"]["subjects"] == 2
        subjects = stored(tmp_path / "raw", "eyes")[1]["subjects"]
        assert subjects == {"01L": "01", "01R": "01", "102L": "102"}

    @pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
    def test_names_whose_accents_are_stored_apart_pair_with_those_that_are_not(
        self, imported, tmp_path, forms: tuple[str, str]
    ) -> None:
        part = {"images": "Gefäße/{stem}.png", "masks": "Masken/{stem}.png", "subject": "{stem}", "site": "{stem}"}
        source = self.layout(
            tmp_path / "mine", patterns=[part], table={"file": "sites.csv", "key": "stem", "site": "site"}
        )
        image, mask = (unicodedata.normalize(form, "é") for form in forms)
        folder = unicodedata.normalize(forms[0], "Gefäße")
        tree(source, {f"{folder}/{image}.png": photograph(), f"Masken/{mask}.png": two_valued()})
        (source / "sites.csv").write_text(f"stem,site\n{mask},lab\n", "utf-8")

        assert imported("folders", source)["lab"]["images"] == 1
        assert list(stored(tmp_path / "raw", "lab")[0]) == [unicodedata.normalize("NFC", "é")]

    def test_title_and_licence_go_into_the_notes(self, imported, tmp_path) -> None:
        patterns = [{"images": "{stem}.png", "masks": "{stem}_mask.png", "site": "lab"}]
        source = self.layout(tmp_path / "mine", patterns=patterns, title="CT of two centres", licence="with leave")

        imported("folders", tree(source, {"a.png": photograph(), "a_mask.png": two_valued()}))

        assert (
            stored(tmp_path / "raw", "lab")[1]["notes"] == "CT of two centres. Classes: 1 foreground. Terms: with leave"
        )

    def test_a_black_mask_is_one_without_foreground(self, imported, tmp_path) -> None:
        patterns = [{"images": "{stem}.png", "masks": "{stem}_mask.png", "site": "lab"}]
        files = {"a.png": photograph(), "a_mask.png": Image.fromarray(HALF * 0)}
        source = tree(self.layout(tmp_path / "mine", patterns=patterns), files)

        assert imported("folders", source)["lab"]["pixels"]["foreground"] == 0

    def test_what_macos_adds_to_an_archive_is_passed_over(self, imported, tmp_path) -> None:
        patterns = [{"images": "**/set/{stem}.png", "masks": "**/set/{stem}_mask.png", "site": "lab"}]
        source = self.layout(tmp_path / "mine", patterns=patterns)
        tree(source, {"set/a.png": photograph(), "set/a_mask.png": two_valued()})
        for name in ("__MACOSX/set/._a.png", "__MACOSX/set/._a_mask.png", "set/._a.png", "set/._a_mask.png"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(b"\0\5\x16\7")

        summary = imported("folders", source)

        assert (summary["lab"]["images"], summary["lab"]["broken"]) == (1, [])

    def test_suffixes_in_capitals_and_names_in_any_script_are_taken(self, imported, tmp_path) -> None:
        source = self.layout(
            tmp_path / "mine",
            patterns=[
                {
                    "images": "{hospital}/Bilder/{stem}.png",
                    "masks": "{hospital}/Masken/{stem}_label.png",
                    "site": "{hospital}",
                }
            ],
        )
        for stem in ("Müller, Jürgen (1)", "Παππάς"):
            tree(
                source / "Klinik Süd",
                {f"Bilder/{stem}.PNG": photograph(), f"Masken/{stem}_label.Png": two_valued()},
            )

        summary = imported("folders", source)

        assert list(summary) == ["Klinik-Sud"]
        masks, site_file = stored(tmp_path / "raw", "Klinik-Sud")
        assert set(masks) == set(site_file["subjects"]) == {"Müller-Jürgen-1", "Παππάς"}


class TestRefusals:
    def one(self, tmp_path: Path, mask: Image.Image | None = None) -> Path:
        files = {"CVC-300/images/1.png": photograph(), "CVC-300/masks/1.png": mask or two_valued()}
        return tree(tmp_path / "source", files)

    def test_an_unknown_importer_is_answered_with_the_nearest(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"importer: unknown 'polyp'; did you mean 'polyps'\?"):
            find_importer("polyp", tmp_path, {})
        assert {"folders", "dsb2018", "polyps"} <= set(importer_names())

    def test_an_option_of_another_importer_is_refused(self, tmp_path) -> None:
        with pytest.raises(
            ConfigError, match=r"import_options\.layout: unknown to importer 'polyps'\. Allowed: merge$"
        ):
            find_importer("polyps", tmp_path, {"layout": "x"})

    def test_a_folder_without_the_layout_says_what_was_looked_for(self, imported, tmp_path) -> None:
        with pytest.raises(DataError, match=r"nothing of the layout of Colonoscopy polyps.*Kvasir-SEG/images"):
            imported("polyps", tree(tmp_path / "other", {"a.png": photograph()}))

    def test_a_layout_that_finds_nothing_shows_a_path_beside_its_pattern(self, imported, tmp_path) -> None:
        source = tree(tmp_path / "other", {"set/scan/a.png": photograph(), "set/scan/b.png": photograph()})
        (source / "import.yml").write_text("patterns: [{images: 'scan/{stem}.png', masks: 'm/{stem}.png', site: x}]")

        with pytest.raises(
            DataError, match=r"own \(scan/\{stem\}\.png\).*such as set/scan/a\.png\); patterns start at"
        ):
            imported("folders", source)
        with pytest.raises(DataError, match=r"2 \.png, 1 \.yml\)") as hidden:
            find_importer("polyps", source, {}, hide_names=True).find(source)
        assert "scan/a" not in str(hidden.value)

    def test_many_folders_that_are_passed_over_are_counted(self, imported, tmp_path, caplog) -> None:
        source = tree(self.one(tmp_path), {f"more/{number:02d}/x.png": photograph() for number in range(23)})

        imported("polyps", source)

        assert len(caplog.messages) == 21
        assert caplog.messages[0] == "passed over: more/00: 1 image file, such as x.png"
        assert caplog.messages[-1] == "passed over: 3 image files in 3 more folders"

    @pytest.mark.parametrize("name", ["images/fold1/images.npy", "masks/fold1/masks.npy"])
    def test_a_pointer_is_named_whatever_the_format(self, imported, tmp_path, name: str) -> None:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        for other in ("images/fold1/images.npy", "masks/fold1/masks.npy"):
            (tmp_path / "source" / other).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "source" / other, np.zeros((1, 8, 8, 3 if "images" in other else 6)))
        np.save(tmp_path / "source" / "images" / "fold1" / "types.npy", np.array(["Breast"]))
        (tmp_path / "source" / name).write_bytes(pointer)

        with pytest.raises(DataError, match=r"\.npy: this is a pointer of Git LFS.*; run git lfs pull"):
            imported("pannuke", tmp_path / "source")

    def test_a_table_that_is_a_pointer_is_named(self, imported, tmp_path) -> None:
        source = tree(tmp_path / "source", {"a.png": photograph(), "m/a.png": two_valued()})
        layout = (
            "patterns: [{images: '{stem}.png', masks: 'm/{stem}.png', site: x}]\ntable: {file: t.csv, key: k, site: s}"
        )
        (source / "import.yml").write_text(layout)
        (source / "t.csv").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")

        with pytest.raises(DataError, match=r"t\.csv: this is a pointer of Git LFS.*; run git lfs pull"):
            imported("folders", source)

    def test_the_private_table_of_names_holds_no_formula(self, tmp_path) -> None:
        source = tree(tmp_path / "source", {"=1+1.png": photograph(), "m/=1+1.png": two_valued()})
        (source / "import.yml").write_text("patterns: [{images: '{stem}.png', masks: 'm/{stem}.png', site: lab}]")

        import_sites(tmp_path / "raw", find_importer("folders", source, {}, hide_names=True), source)

        assert (tmp_path / "private" / "lab" / "names.csv").read_text().splitlines()[1].endswith(",'=1+1.png")

    def test_passed_over_names_stay_hidden(self, tmp_path, caplog) -> None:
        source = tree(self.one(tmp_path), {"Miller/x.png": photograph(), "Miller/y.png": photograph()})

        import_sites(tmp_path / "raw", find_importer("polyps", source, {}, hide_names=True), source)

        assert caplog.messages == ["passed over: 2 image files in 1 folder"]

    def test_a_site_that_is_there_is_never_touched(self, imported, tmp_path) -> None:
        kept = tmp_path / "raw" / "CVC-300" / "images" / "mine.png"
        kept.parent.mkdir(parents=True)
        kept.write_bytes(b"mine")

        with pytest.raises(DataError, match="CVC-300 is there already"):
            imported("polyps", self.one(tmp_path))

        assert [path for path in (tmp_path / "raw").rglob("*") if path.is_file()] == [kept]

    def test_what_is_broken_stops_the_import_and_nothing_is_left(self, imported, tmp_path) -> None:
        source = self.one(tmp_path)
        (source / "CVC-300" / "images" / "1.png").write_bytes(b"\x89PNG")

        with pytest.raises(DataError, match=r"(?s)CVC-300/images/1\.png: cannot be read.*on_bad_sample=quarantine"):
            imported("polyps", source)

        assert list((tmp_path / "raw").iterdir()) == []

    def test_quarantine_lists_it_and_imports_the_others(self, imported, tmp_path) -> None:
        source = tree(self.one(tmp_path), {"CVC-300/images/2.png": photograph(2), "CVC-300/masks/2.png": two_valued()})
        (source / "CVC-300" / "masks" / "1.png").write_bytes(b"")

        found = imported("polyps", source, quarantine=True)["CVC-300"]

        assert found["images"] == 1
        assert [entry["file"] for entry in found["broken"]] == ["CVC-300/masks/1.png"]
        assert set(stored(tmp_path / "raw", "CVC-300")[0]) == {"2"}

    def test_a_mask_of_another_size_is_broken(self, imported, tmp_path) -> None:
        with pytest.raises(DataError, match="the mask is 3 x 4, its image 12 x 16"):
            imported("polyps", self.one(tmp_path, Image.fromarray(np.zeros((3, 4), np.uint8))))

    def test_an_image_without_mask_is_named(self, imported, tmp_path) -> None:
        source = tree(self.one(tmp_path), {"CVC-300/images/2.png": photograph()})

        with pytest.raises(DataError, match=r"2\.png: no mask as \*\*/CVC-300/masks/\{stem\}\.png"):
            imported("polyps", source)
        assert imported("polyps", source, quarantine=True)["CVC-300"]["images"] == 1

    def test_masks_that_are_not_told_apart_are_named(self, imported, tmp_path) -> None:
        source = tree(
            tmp_path / "source", {"a.png": photograph(), "m/a_1.png": two_valued(), "m/a_2.png": two_valued()}
        )
        keys = {"patterns": [{"images": "{stem}.png", "masks": "m/{stem}_*.png", "site": "one"}]}
        (source / "import.yml").write_text(yaml.safe_dump(keys))

        with pytest.raises(DataError, match=r"a\.png: 2 masks \(m/a_1\.png, m/a_2\.png\); keep one"):
            imported("folders", source)

    def test_a_link_out_of_the_source_is_not_followed(self, imported, tmp_path) -> None:
        source = self.one(tmp_path)
        (tmp_path / "secret.png").write_bytes((source / "CVC-300" / "images" / "1.png").read_bytes())
        (source / "CVC-300" / "images" / "1.png").unlink()
        (source / "CVC-300" / "images" / "1.png").symlink_to(tmp_path / "secret.png")

        with pytest.raises(DataError, match="a link that leads out of the source"):
            imported("polyps", source)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (
                '{"shapes": [{"label": "macula", "points": [[1, 1], [4, 1], [4, 4]]}]}',
                "an outline has a name that this layout lacks",
            ),
            ('{"shapes": [{"label": "disc", "points": [[1, 1], [NaN, 1], [4, 4]]}]}', "corners that are no numbers"),
            ('{"shapes": [{"points": [[1, 1]]}]}', "cannot be read"),
            ("[1, 2", "cannot be read"),
        ],
    )
    def test_outlines_that_cannot_be_used_are_named(self, imported, tmp_path, content: str, reason: str) -> None:
        source = tree(tmp_path / "fundus", {"G1020/Images/image_0.jpg": photograph()})
        (source / "G1020" / "Images" / "image_0.json").write_text(content)

        with pytest.raises(DataError, match=rf"image_0\.json: .*{reason}"):
            imported("fundus_glaucoma", source)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"<Annotations><Annotation>",
            b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><Annotations>&x;</Annotations>',
            b"MATLAB 5.0 MAT-file" + bytes(200),
        ],
    )
    def test_damaged_mask_files_are_named(self, imported, tmp_path, content: bytes) -> None:
        slide = "TCGA-2Z-A9JG-01Z-00-DX1"
        source = tree(tmp_path / "s", {f"{slide}/{slide}_1.tif": photograph(), "ORIGA/Images/001.jpg": photograph()})
        (source / slide / f"{slide}_1.xml").write_bytes(content)
        (source / "ORIGA" / "Semi-automatic-annotations").mkdir()
        (source / "ORIGA" / "Semi-automatic-annotations" / "001.mat").write_bytes(content)

        with pytest.raises(DataError, match=r"_1\.xml: (cannot be read|the file is empty)"):
            imported("monusac", source)
        with pytest.raises(DataError, match=r"001\.mat: (cannot be read|the file is empty)"):
            imported("fundus_glaucoma", source)

    def test_a_value_that_means_nothing_is_named(self, imported, tmp_path) -> None:
        files = {"D/train/ROIs/image/1.png": photograph(), "D/train/ROIs/mask/1.png": two_valued(77)}

        with pytest.raises(DataError, match="mask values 77 are unknown to this layout, which has 0, 128, 255"):
            imported("fundus_dofe", tree(tmp_path / "source", files))


@pytest.mark.parametrize(
    ("importer", "site", "images", "masks", "suffix"),
    [
        ("breast_ultrasound", "UDIAT", "BUS/original", "BUS/GT", ".png"),
        ("polyps", "Kvasir-SEG", "Kvasir-SEG/images", "Kvasir-SEG/masks", ".jpg"),
    ],
)
def test_a_photograph_with_an_orientation_tag_is_written_upright_as_its_mask_is(
    imported, tmp_path: Path, importer: str, site: str, images: str, masks: str, suffix: str
) -> None:
    source = tree(tmp_path / "source", {f"{masks}/{number:06}{suffix}": two_valued() for number in range(3)})
    exif = Image.Exif()
    exif[0x0112] = 6
    (source / images).mkdir()
    for number in range(2):
        lying = np.ascontiguousarray(np.rot90(np.array(photograph(number))))
        Image.fromarray(lying).save(source / images / f"{number:06}{suffix}", exif=exif)
    photograph(2).save(source / images / f"000002{suffix}")

    imported(importer, source)

    written = tmp_path / "raw" / site / "images"
    # What needs no change stays the file it was.
    assert sorted(path.name for path in written.iterdir()) == ["000000.png", "000001.png", f"000002{suffix}"]
    upright = Image.open(written / "000000.png")
    assert (upright.size, dict(upright.getexif())) == (SIZE[::-1], {})
    if suffix == ".png":
        np.testing.assert_array_equal(np.array(upright), np.array(photograph()))
    config = PreprocessingConfig(min_images=3, split={"validation": 1, "test": 1})
    assert prepare_site(tmp_path / "raw", site, config, 0).report["alerts"] == []


def test_imported_sites_can_be_prepared(imported, tmp_path) -> None:
    files = {}
    for number in range(8):
        files[f"CVC-300/images/{number}.png"] = photograph(number)
        files[f"CVC-300/masks/{number}.png"] = two_valued()

    imported("polyps", tree(tmp_path / "source", files))

    assert discover_sites(tmp_path / "raw") == ("CVC-300",)
    prepared = prepare_site(tmp_path / "raw", "CVC-300", PreprocessingConfig(image_size=32), seed=0)
    assert len(prepared.manifest) == 8
    assert np.unique(prepared.arrays["masks"]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("pattern", "name", "values"),
    [
        ("{site}/{stem}.png", "a/b.png", {"site": "a", "stem": "b"}),
        ("{site}/{stem}.png", "a/b/c.png", None),
        ("**/{stem}.png", "a/b/c.png", {"stem": "c"}),
        ("**/{stem}.png", "c.png", {"stem": "c"}),
        ("{id}/images/{id}.png", "x/images/y.png", None),
        ("a*/{stem}[1].png", "abc/s[1].png", {"stem": "s"}),
        ("{stem}.png", "zeile\n2.png", {"stem": "zeile\n2"}),
        ("{child:d}{eye:w}.png", "01L.png", {"child": "01", "eye": "L"}),
        ("{child:d}{eye:w}.png", "01_L.png", None),
        ("{child:d}{eye:w}.png", "L01.png", None),
        ("{child:d}_{child:d}.png", "01_01.png", {"child": "01"}),
    ],
)
def test_patterns(pattern: str, name: str, values: dict[str, str] | None) -> None:
    assert [found for _, found in match_files([name], pattern)] == ([] if values is None else [values])


@pytest.mark.real_data
def test_the_groups_of_the_data_science_bowl_are_told_apart(nuclei_root: Path) -> None:
    from fedsca_pipeline.data.readers.images import read_image

    for site in sorted(path for path in nuclei_root.iterdir() if path.is_dir()):
        kind = site.name.rsplit("_", 1)[0]
        groups = {acquisition(read_image(path)).rsplit("_", 1)[0] for path in (site / "images").iterdir()}
        assert groups == {kind}


@pytest.mark.real_data
def test_both_eyes_of_a_child_stay_together_in_real_names(imported, tmp_path, retina_root: Path) -> None:
    part = {"images": "images/{child:d}{eye:w}.jpg", "masks": "masks/{child:d}{eye:w}.png", "site": "chase"}
    keys = {"patterns": [part | {"stem": "{child}{eye}", "subject": "{child}"}]}
    (tmp_path / "import.yml").write_text(yaml.safe_dump(keys))

    summary = imported("folders", retina_root / "chase_db1", {"layout": str(tmp_path / "import.yml")})

    assert (summary["chase"]["images"], summary["chase"]["subjects"]) == (28, 14)
    assert stored(tmp_path / "raw", "chase")[1]["subjects"]["14R"] == "14"


@pytest.mark.real_data
def test_real_photographs_in_the_published_layout_are_read(imported, tmp_path, retina_root: Path) -> None:
    for image in sorted((retina_root / "chase_db1" / "images").iterdir())[:4]:
        files = {
            f"Image_{image.stem}.jpg": Image.open(image).convert("RGB"),
            f"Image_{image.stem}_1stHO.png": Image.open(retina_root / "chase_db1" / "masks" / f"{image.stem}.png"),
        }
        tree(tmp_path / "source" / "CHASEDB", files)

    assert imported("vessels", tmp_path / "source")["CHASE_DB1"]["images"] == 4
