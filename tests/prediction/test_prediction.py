"""New images become masks, overlays, probabilities and a table, whatever their format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from site_models import make_model

from fedsca_pipeline import load_site_model
from fedsca_pipeline.config import PredictConfig
from fedsca_pipeline.data.readers.dicom import read_frame_segmentation, read_segmentation, read_series
from fedsca_pipeline.data.readers.volume import write_nifti
from fedsca_pipeline.data.readers.volumes import read_volume
from fedsca_pipeline.errors import ConfigError, DataError
from fedsca_pipeline.model.site_model import SiteModel
from fedsca_pipeline.prediction.predict import Predicted, predict
from fedsca_pipeline.prediction.segmenter import COLUMNS, Segmenter
from fedsca_pipeline.prediction.sources import find_sources

AFFINE = np.diag([0.5, 0.5, 2.0, 1.0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SiteModel:
    root = tmp_path_factory.mktemp("model")
    return load_site_model(make_model(root / "north", root / "foundations", classes=2, class_names=("cyst", "=vessel")))


def pixels(seed: int, shape: tuple[int, ...] = (40, 28)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def run(model: SiteModel, place: Path, output: Path, **options: Any) -> Predicted:
    return predict(model, find_sources(place).sources, output, PredictConfig(**options))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine flat images of different formats and sizes, in folders."""
    folder = tmp_path / "scans"
    (folder / "ward").mkdir(parents=True)
    for number in range(7):
        Image.fromarray(pixels(number, (40 + number, 28))).save(folder / "ward" / f"{number}.png")
    Image.fromarray(pixels(8, (30, 30, 3))).save(folder / "photo.jpg")
    tifffile.imwrite(folder / "deep.tif", pixels(9).astype(np.uint16) * 100)
    return folder


def test_every_image_gets_the_mask_that_the_model_gives_it_alone(
    model: SiteModel, images: Path, tmp_path: Path
) -> None:
    done = run(model, images, tmp_path / "out", batch_size=4)

    assert done.new == 9
    assert done.unreadable == []
    for path in images.rglob("*.*"):
        name = path.relative_to(images).with_suffix(".png")
        mask = np.array(Image.open(tmp_path / "out" / "masks" / name))
        np.testing.assert_array_equal(mask, model.segment(path))
        assert Image.open(tmp_path / "out" / "overlays" / name).size == mask.shape[::-1]


def test_the_table_has_a_row_per_image_and_class(model: SiteModel, images: Path, tmp_path: Path) -> None:
    table = run(model, images, tmp_path / "out").table

    assert tuple(table.columns) == COLUMNS
    assert len(table) == 18
    assert table["image"].is_monotonic_increasing
    for _, row in table[table["image"] == "ward/3"].iterrows():
        mask = np.array(Image.open(tmp_path / "out" / "masks" / "ward" / "3.png")) == row["class"]
        assert row["name"] == {1: "cyst", 2: "=vessel"}[row["class"]]
        assert row["pixels"] == mask.sum()
        assert (row["components"] > 0) == mask.any()
        assert pd.isna(row["area_mm2"])
        assert pd.isna(row["confidence"]) != mask.any()
    assert table["confidence"].dropna().between(0, 1).all()


def test_probabilities_are_those_of_which_the_mask_is_made(model: SiteModel, images: Path, tmp_path: Path) -> None:
    table = run(model, images / "ward", tmp_path / "out", probabilities=True).table

    chances = tifffile.imread(tmp_path / "out" / "probabilities" / "0.tif")
    mask = np.array(Image.open(tmp_path / "out" / "masks" / "0.png"))
    assert chances.shape == (2, 40, 28)
    np.testing.assert_array_equal(np.where(chances[1] > 0.5, 2, np.where(chances[0] > 0.5, 1, 0)), mask)
    (confidence,) = table.loc[(table["image"] == "0") & (table["class"] == 2), "confidence"]
    assert confidence == pytest.approx(chances[1][mask == 2].mean(), abs=1e-4)


def test_what_is_done_is_not_done_again(
    model: SiteModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, images, tmp_path / "out")
    Image.fromarray(pixels(20)).save(images / "ward" / "0.png")
    (tmp_path / "out" / "masks" / "ward" / "1.png").unlink()
    (tmp_path / "out" / ".records" / "ward" / "2.json").write_text("{")
    segmented = []
    real = Segmenter._image

    def watched(self: Segmenter, picture: Any, logits: Any) -> Any:
        segmented.append(picture.source.name)
        return real(self, picture, logits)

    monkeypatch.setattr(Segmenter, "_image", watched)

    again = run(model, images, tmp_path / "out")

    assert segmented == ["ward/0", "ward/1", "ward/2"]
    assert again.new == 3
    untouched = ~again.table["image"].isin(["ward/0"])
    pd.testing.assert_frame_equal(again.table[untouched], first.table[untouched])


@pytest.mark.parametrize("change", ["options", "model"])
def test_another_model_or_option_does_everything_again(
    model: SiteModel, images: Path, tmp_path: Path, change: str
) -> None:
    run(model, images, tmp_path / "out")
    other = SiteModel(model.network, model.card.model_copy(update={"threshold": 0.6})).eval()

    again = run(other if change == "model" else model, images, tmp_path / "out", probabilities=change == "options")

    assert again.new == 9


def test_an_interrupted_command_goes_on_where_it_stopped(model: SiteModel, images: Path, tmp_path: Path) -> None:
    sources = find_sources(images).sources
    steps = iter(range(5))

    def stop() -> None:
        if next(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, sources, tmp_path / "out", PredictConfig(batch_size=2), stop)
    resumed = predict(model, sources, tmp_path / "out", PredictConfig(batch_size=2))
    whole = predict(model, sources, tmp_path / "whole", PredictConfig(batch_size=2))

    assert resumed.new == 4
    pd.testing.assert_frame_equal(resumed.table, whole.table)
    for path in (tmp_path / "whole").rglob("*.png"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_broken_file_is_told_and_the_others_are_segmented(model: SiteModel, images: Path, tmp_path: Path) -> None:
    (images / "ward" / "3.png").write_bytes(b"no image")
    tifffile.imwrite(images / "nan.tif", np.full((8, 8), np.nan, np.float32))

    done = run(model, images, tmp_path / "out", batch_size=3)

    assert [(found.file, bool(found.cure)) for found in done.unreadable] == [("nan", True), ("ward/3", True)]
    assert done.new == 8
    assert not (tmp_path / "out" / "masks" / "ward" / "3.png").exists()


def test_a_volume_keeps_its_grid_and_has_millilitres(model: SiteModel, tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).normal(size=(20, 24, 6)).astype(np.float32)
    turned = AFFINE[:, [1, 0, 2, 3]]
    write_nifti(tmp_path / "in" / "head.nii.gz", voxels, turned)

    done = run(model, tmp_path / "in", tmp_path / "out", probabilities=True, batch_size=4)

    image = nibabel.load(tmp_path / "out" / "masks" / "head.nii.gz")
    labels = np.asarray(image.dataobj)
    np.testing.assert_array_equal(labels, model.segment_volume(tmp_path / "in" / "head.nii.gz"))
    np.testing.assert_array_equal(image.affine, turned)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] > 0
    chances = nibabel.load(tmp_path / "out" / "probabilities" / "head.nii.gz")
    assert chances.shape == (20, 24, 6, 2)
    assert ((np.asarray(chances.dataobj)[..., 1] > 0.5) == (labels == 2)).mean() > 0.999
    row = done.table.set_index("class").loc[2]
    assert row["volume_ml"] == pytest.approx((labels == 2).sum() * 0.5e-3)
    assert (tmp_path / "out" / "overlays" / "head.png").is_file()


@pytest.fixture
def series(tmp_path: Path, dicom_files) -> Path:
    stored = np.random.default_rng(1).integers(0, 500, (20, 24, 5)).astype(np.int16)
    slices = dicom_files.slices(stored, np.diag([0.5, 0.5, 3.0, 1.0]))
    # Their order says nothing.
    return dicom_files.series(tmp_path / "export" / "ct", slices[::-1])


def test_a_dicom_series_becomes_a_segmentation_that_lies_on_it(model: SiteModel, series: Path, tmp_path: Path) -> None:
    done = run(model, series.parent, tmp_path / "out")

    volume = read_series(series)
    expected = model.segment_volume(volume)
    found = read_segmentation(tmp_path / "out" / "segmentations" / "ct.dcm", volume)
    np.testing.assert_array_equal(found.voxels, expected)
    np.testing.assert_array_equal(read_volume(tmp_path / "out" / "masks" / "ct.nii.gz").voxels, expected)
    assert done.table["image"].unique().tolist() == ["ct"]


def test_a_segmentation_names_its_patient_series_and_segments(model: SiteModel, series: Path, tmp_path: Path) -> None:
    from pydicom import dcmread

    run(model, series.parent, tmp_path / "out")
    run(model, series.parent, tmp_path / "again")

    seg = dcmread(tmp_path / "out" / "segmentations" / "ct.dcm")
    source = dcmread(series / "0000.dcm")
    assert (seg.PatientID, seg.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["cyst", "=vessel"]
    assert dcmread(tmp_path / "again" / "segmentations" / "ct.dcm").SOPInstanceUID == seg.SOPInstanceUID


@pytest.mark.parametrize("placed", [True, False])
def test_a_flat_dicom_file_becomes_a_mask_a_segmentation_and_square_millimetres(
    model: SiteModel, tmp_path: Path, dicom_files, placed: bool
) -> None:
    data = dicom_files.data_set(pixels(3), PixelSpacing=[0.5, 0.25])
    if not placed:
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
            delattr(data, keyword)
    path = dicom_files.save(tmp_path / "in" / "frame.dcm", data)

    done = run(model, tmp_path / "in", tmp_path / "out")

    mask = np.array(Image.open(tmp_path / "out" / "masks" / "frame.png"))
    np.testing.assert_array_equal(mask, model.segment(pixels(3)))
    np.testing.assert_array_equal(read_frame_segmentation(tmp_path / "out" / "segmentations" / "frame.dcm", path), mask)
    row = done.table.set_index("class").loc[2]
    assert mask.any()
    assert row["area_mm2"] == ((mask == 2).sum() * 0.125 if placed else None)


def test_a_header_without_what_a_segmentation_needs_is_told(model: SiteModel, tmp_path: Path, dicom_files) -> None:
    for name in ("good", "poor"):
        data = dicom_files.data_set(pixels(3))
        if name == "poor":
            del data.StudyInstanceUID
        dicom_files.save(tmp_path / "in" / f"{name}.dcm", data)

    done = run(model, tmp_path / "in", tmp_path / "out")

    (found,) = done.unreadable
    assert found.file == "poor"
    assert "does not allow a DICOM SEG" in found.reason
    assert done.table["image"].unique().tolist() == ["good"]
    assert (tmp_path / "out" / "masks" / "poor.png").is_file()


class TestSources:
    def test_one_file_is_a_source(self, tmp_path: Path) -> None:
        Image.fromarray(pixels(0)).save(tmp_path / "a.png")
        Image.fromarray(pixels(0)).save(tmp_path / "b.png")

        (found,) = find_sources(tmp_path / "a.png").sources

        assert (found.name, found.files) == ("a", (tmp_path / "a.png",))

    def test_files_of_one_stem_have_their_suffix_in_the_name(self, tmp_path: Path) -> None:
        for name in ("a.png", "a.bmp", "b.png"):
            Image.fromarray(pixels(0)).save(tmp_path / name)

        assert [source.name for source in find_sources(tmp_path).sources] == ["a_bmp", "a_png", "b"]

    def test_names_that_only_the_suffix_of_another_tells_apart_are_refused(self, tmp_path: Path) -> None:
        for name in ("a.png", "a.bmp", "a_png.png"):
            Image.fromarray(pixels(0)).save(tmp_path / name)

        with pytest.raises(DataError, match="rename one"):
            find_sources(tmp_path)

    def test_hidden_files_are_skipped_and_others_passed_over(self, tmp_path: Path) -> None:
        for name in ("a.png", ".hidden.png"):
            Image.fromarray(pixels(0)).save(tmp_path / name)
        (tmp_path / "boxes.csv").write_text("")
        (tmp_path / "Thumbs.db").write_text("")

        found = find_sources(tmp_path)

        assert [source.name for source in found.sources] == ["a"]
        assert found.passed_over == [tmp_path / "boxes.csv"]

    def test_two_series_of_one_folder_have_names_of_their_own(self, tmp_path: Path, dicom_files) -> None:
        stored = np.zeros((4, 5, 3), np.int16)
        for start in (0, 10):
            for index, data in enumerate(dicom_files.slices(stored, AFFINE)):
                dicom_files.save(tmp_path / "in" / f"{start + index}.dcm", data)

        found = find_sources(tmp_path / "in").sources

        assert len({source.name for source in found}) == 2
        assert [len(source.files) for source in found] == [3, 3]

    def test_a_folder_that_is_one_series_has_the_folder_s_name(self, series: Path) -> None:
        (found,) = find_sources(series).sources

        assert found.name == "ct"

    def test_a_segmentation_is_no_image(self, series: Path, model: SiteModel, tmp_path: Path) -> None:
        run(model, series, tmp_path / "out")
        (tmp_path / "out" / "segmentations" / "ct.dcm").rename(series / "seg.dcm")

        (found,) = find_sources(series).sources

        assert len(found.files) == 5

    def test_a_link_out_of_the_folder_is_told(self, tmp_path: Path) -> None:
        Image.fromarray(pixels(0)).save(tmp_path / "secret.png")
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret.png")

        found = find_sources(tmp_path / "in")

        assert found.sources == []
        assert "leads out" in found.unreadable[0].reason

    def test_no_image_and_no_folder_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("")

        with pytest.raises(DataError, match=r"no image there.*passed over: notes\.txt"):
            find_sources(tmp_path)
        with pytest.raises(ConfigError, match=r"predict\.source: there is no"):
            find_sources(tmp_path / "nowhere")
