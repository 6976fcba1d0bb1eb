"""A site of volumes: slices in manifest and arrays, whole volumes in splits, duplicates and the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.config import PreprocessingConfig, SplitConfig, VolumeConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.preprocessing.prepare import PreparedSite, prepare_site
from fedsca_pipeline.data.preprocessing.slices import cut
from fedsca_pipeline.errors import DataError

SITE, SLICES = "north", 7
CONFIG = PreprocessingConfig(image_size=32, split=SplitConfig(validation=1, test=2))


@pytest.fixture
def raw(tmp_path: Path, write_volume_site: Callable[..., None]) -> Path:
    write_volume_site(tmp_path / "raw" / SITE, count=6, slices=SLICES)
    return tmp_path / "raw"


def prepare(raw: Path, config: PreprocessingConfig = CONFIG, previous: PreparedSite | None = None) -> PreparedSite:
    return prepare_site(raw, SITE, config, 0, previous.manifest if previous else None)


def with_volume(**changes: object) -> PreprocessingConfig:
    return CONFIG.model_copy(update={"volume": VolumeConfig.model_validate(changes)})


def load(path: Path) -> nibabel.Nifti1Image:
    return nibabel.load(path)


def broken(raw: Path) -> dict[str, str]:
    report = prepare(raw, CONFIG.model_copy(update={"on_bad_sample": "quarantine", "min_images": 3})).report
    return {entry["file"]: entry["reason"] for entry in report["broken"]}


def test_each_slice_is_a_row_and_a_volume_is_in_one_split(raw: Path) -> None:
    manifest = prepare(raw).manifest
    assert len(manifest) == 6 * SLICES
    assert manifest["row"].tolist() == list(range(6 * SLICES))
    for stem, rows in manifest.groupby("volume"):
        assert rows["slice"].tolist() == list(range(SLICES))
        assert rows[["split", "subject", "image"]].drop_duplicates().to_numpy().tolist() == [
            [rows["split"].iloc[0], stem, f"images/{stem}.nii.gz"]
        ]
    assert manifest.drop_duplicates("volume")["split"].value_counts().to_dict() == {
        "train": 3,
        "test": 2,
        "validation": 1,
    }


def test_arrays_hold_the_slices_upright_under_their_names(raw: Path, tmp_path: Path) -> None:
    prepared = prepare(raw)
    prepared.arrays.move_to(tmp_path / "north.safetensors")
    arrays = SiteArrays(tmp_path / "north.safetensors", prepared.manifest)
    names = arrays.names("test")
    assert names[:3] == [f"{names[0].split('#')[0]}#{index:03d}" for index in range(3)]
    image, mask, valid = arrays.batch([arrays.rows("test")[3]])
    volume = load(raw / SITE / "masks" / f"{names[3].split('#')[0]}.nii.gz")
    np.testing.assert_array_equal(mask[0], cut(np.asanyarray(volume.dataobj), volume.affine, 2)[3])
    assert mask.any()
    assert valid.all()
    assert (image[0, 0] == image[0, 2]).all()


def test_how_the_files_lie_changes_nothing_but_their_digests(
    raw: Path, tmp_path: Path, write_volume_site: Callable[..., None]
) -> None:
    turned = np.array([[0, -0.8, 0, 3], [0, 0, 0.8, -4], [-2.5, 0, 0, 9], [0, 0, 0, 1.0]])
    write_volume_site(tmp_path / "turned" / SITE, count=6, slices=SLICES, affine=turned)
    one, other = prepare(raw), prepare(tmp_path / "turned")
    assert load(tmp_path / "turned" / SITE / "images" / "v0.nii.gz").shape != (32, 32, SLICES)
    for name in ("images", "masks", "sizes"):
        np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
    columns = one.manifest.columns.difference(["sha256", "mask_sha256"])
    assert one.manifest[columns].equals(other.manifest[columns])


def test_empty_slices_stay_in_validation_and_test_and_are_thinned_out_in_training(raw: Path) -> None:
    whole, thinned = prepare(raw), prepare(raw, with_volume(empty_slices=0.0))
    for split in ("validation", "test"):
        rows = [site.manifest[site.manifest["split"] == split] for site in (whole, thinned)]
        assert rows[0][["volume", "slice"]].to_numpy().tolist() == rows[1][["volume", "slice"]].to_numpy().tolist()
        assert (rows[1]["classes"] == "[]").any()
    train = thinned.manifest[thinned.manifest["split"] == "train"]
    assert (train["classes"] != "[]").all()
    everything = whole.manifest[whole.manifest["split"] == "train"]
    assert len(train) == (everything["classes"] != "[]").sum() < len(everything)
    slices = thinned.report["volumes"]["slices"]
    assert slices["left_out"] == len(everything) - len(train)
    assert slices["train"] == len(train)
    for name in ("images", "masks"):
        kept = whole.manifest.merge(thinned.manifest, on=["volume", "slice"])
        np.testing.assert_array_equal(whole.arrays[name][kept["row_x"]], thinned.arrays[name][kept["row_y"]])


def test_volumes_count_once_in_splits_and_in_the_report(raw: Path) -> None:
    config = CONFIG.model_copy(update={"split": SplitConfig(validation=1, test=1, max_train=2)})
    report = prepare(raw, config).report
    counts = report["counts"]
    assert {key: counts[key] for key in ("found", "used", "train", "validation", "test", "unused")} == {
        "found": 6, "used": 6, "train": 2, "validation": 1, "test": 1, "unused": 2,
    }  # fmt: skip
    assert report["volumes"]["count"] == 6
    assert report["volumes"]["slices"] == {
        "train": 14, "validation": 7, "test": 7, "unused": 14, "left_out": 0,
    }  # fmt: skip
    assert report["volumes"]["spacing_mm"] == {
        name: pytest.approx([mm, mm]) for name, mm in (("slice", 2.5), ("row", 0.8), ("column", 0.8))
    }
    assert report["intensity"]["kinds"] == {"int16 volume": 6}


def test_known_volumes_keep_their_split_when_others_come(raw: Path, write_volume_site: Callable[..., None]) -> None:
    before = prepare(raw, with_volume(empty_slices=0.0))
    write_volume_site(raw / SITE, count=9, slices=SLICES)
    after = prepare(raw, with_volume(axis=1), before)
    splits = [site.manifest.drop_duplicates("volume").set_index("volume")["split"] for site in (before, after)]
    assert splits[1][splits[0].index].equals(splits[0])
    assert after.report["split"]["drawn"] == "kept"


def test_a_copy_is_found_by_the_whole_volume_and_empty_slices_are_no_copies(raw: Path) -> None:
    assert not broken(raw)
    for kind in ("images", "masks"):
        twin = load(raw / SITE / kind / "v0.nii.gz")
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(twin.dataobj), twin.affine), raw / SITE / kind / "w.nii")
    assert broken(raw) == {"images/w.nii": "the same picture as images/v0.nii.gz, of another subject"}


def test_flat_images_and_volumes_mix_within_a_site(raw: Path) -> None:
    for kind in ("images", "masks"):
        spot = np.zeros((32, 32), np.uint8)
        spot[8:20, 8:20] = 255
        Image.fromarray(spot).save(raw / SITE / kind / "flat.png")
    manifest = prepare(raw).manifest
    flat = manifest[manifest["image"] == "images/flat.png"]
    assert flat[["volume", "slice"]].to_numpy().tolist() == [["", -1]]
    assert len(manifest) == 6 * SLICES + 1


def test_masks_use_the_label_map_and_255_alone_means_one(raw: Path) -> None:
    mask = load(raw / SITE / "masks" / "v0.nii.gz")
    nibabel.save(
        nibabel.Nifti1Image(np.asanyarray(mask.dataobj) * np.uint8(255), mask.affine),
        raw / SITE / "masks" / "v0.nii.gz",
    )
    assert set(np.unique(prepare(raw).arrays["masks"])) == {0, 1}
    (raw / SITE / "site.yml").write_text("label_map: {1: 2}\n")
    with pytest.raises(DataError, match=r"masks/v1.nii.gz.*: unknown label value 255 \(classes are 0..1\)"):
        prepare(raw)


def test_image_and_mask_of_different_kinds_and_grids_are_broken(raw: Path) -> None:
    masks = raw / SITE / "masks"
    (masks / "v0.nii.gz").unlink()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(masks / "v0.png")
    mask = load(masks / "v1.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(mask.dataobj), np.diag([0.8, 0.8, 5.0, 1.0])), masks / "v1.nii.gz")
    (masks / "v2.nii.gz").unlink()
    reasons = broken(raw)
    assert "one is a volume, the other flat" in reasons["masks/v0.png"]
    assert "lies elsewhere than its image" in reasons["masks/v1.nii.gz"]
    assert reasons["images/v2.nii.gz"] == "image without a mask"


def test_too_few_volumes_stop_however_many_slices_there_are(
    tmp_path: Path, write_volume_site: Callable[..., None]
) -> None:
    write_volume_site(tmp_path / SITE, count=3, slices=SLICES)
    with pytest.raises(DataError, match=r"3 usable images, preprocessing.min_images is 4"):
        prepare(tmp_path)


def test_headers_that_contradict_themselves_are_told(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in (raw / SITE / "images").iterdir():
        image = load(path)
        image = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine)
        image.header.set_zooms((1.0, 1.0, 1.0))
        nibabel.save(image, path)

    report = prepare(raw).report

    (alert,) = report["alerts"]
    assert alert.startswith("6 files (images/v0.nii.gz, images/v1.nii.gz, images/v2.nii.gz, ...): its header has two")
    assert "0.8 x 0.8 x 2.5 mm by its sform, which is used for slices and metrics, and 1 x 1 x 1 mm" in alert
    assert f"{SITE}: {alert}" in caplog.messages
    assert sum("two spacings" in warning for warning in report["warnings"]) == 6
    assert report["volumes"]["spacing_mm"]["slice"] == pytest.approx([2.5, 2.5])


def test_a_class_that_every_volume_loses_is_told_with_the_size_that_keeps_it(raw: Path) -> None:
    for path in (raw / SITE / "masks").iterdir():
        mask = load(path)
        voxels = np.asanyarray(mask.dataobj).copy()
        voxels[1, 1, 3] = 2
        nibabel.save(nibabel.Nifti1Image(voxels, mask.affine), path)

    report = prepare(raw, CONFIG.model_copy(update={"image_size": 16, "classes": 2})).report

    assert report["alerts"] == [
        "class 2: resizing to 16 pixels loses it in 6 masks, all that show it, so it is not learned here; "
        "preprocessing.image_size=32 keeps it in each"
    ]
