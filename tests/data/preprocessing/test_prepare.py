"""A raw site folder becomes manifest, arrays and report; what is wrong with it is named file by file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from safetensors.numpy import save_file

from fedsca_pipeline.config import NormaliseConfig, PreprocessingConfig, SplitConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.data.preprocessing.prepare import PreparedSite, prepare_site
from fedsca_pipeline.data.site_folder.discovery import discover_sites, fingerprint_site
from fedsca_pipeline.errors import DataError

SITE = "north"
CONFIG = PreprocessingConfig(image_size=32, split=SplitConfig(validation=2, test=3))
QUARANTINE = CONFIG.model_copy(update={"on_bad_sample": "quarantine"})


def scan(seed: int, shape: tuple[int, ...] = (24, 20)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def spot(value: int = 255, shape: tuple[int, int] = (24, 20)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[8:16, 4:12] = value
    return mask


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    else:
        Image.fromarray(pixels).save(path)


def add(raw: Path, stem: str, image: np.ndarray, mask: np.ndarray, suffix: str = ".png") -> None:
    save(raw / SITE / "images" / f"{stem}{suffix}", image)
    save(raw / SITE / "masks" / f"{stem}.png", mask)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number in range(10):
        add(tmp_path / "raw", f"p{number // 2}_{number}", scan(number), spot())
    return tmp_path / "raw"


def prepare(raw: Path, config: PreprocessingConfig = CONFIG, **options) -> PreparedSite:
    return prepare_site(raw, SITE, config, options.pop("seed", 0), **options)


def site_file(raw: Path, text: str) -> None:
    (raw / SITE / "site.yml").write_text(text)


def splits(prepared: PreparedSite) -> dict[str, str]:
    return dict(zip(prepared.manifest["image"], prepared.manifest["split"], strict=True))


def stored(manifest: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(manifest.to_csv(index=False)), dtype=dict(MANIFEST_DTYPES))


def test_manifest_arrays_and_report_agree(raw: Path) -> None:
    prepared = prepare(raw)

    assert list(prepared.manifest.columns) == list(MANIFEST_DTYPES)
    assert prepared.manifest["row"].tolist() == list(range(10))
    assert prepared.arrays["images"].shape == (10, 3, 32, 32)
    assert prepared.arrays["masks"].shape == (10, 32, 32)
    assert prepared.arrays["sizes"].tolist() == [[32, 27]] * 10
    assert {name: array.dtype.name for name, array in prepared.arrays.items()} == {
        "images": "uint8",
        "masks": "uint8",
        "sizes": "int32",
        "manifest": "uint8",
    }
    counts = prepared.report["counts"]
    assert counts == {
        "found": 10, "used": 10, "broken": 0, "subjects": 10, "train": 5, "validation": 2, "test": 3, "unused": 0,
    }  # fmt: skip
    assert prepared.report["fingerprint"] == fingerprint_site(raw, SITE)
    assert json.loads(json.dumps(prepared.report, allow_nan=False)) == prepared.report


def test_padding_is_zero_in_images_and_masks(raw: Path) -> None:
    arrays = prepare(raw, CONFIG.model_copy(update={"normalise": NormaliseConfig(method="none")})).arrays

    assert not arrays["images"][..., 27:].any()
    assert not arrays["masks"][..., 27:].any()
    assert arrays["images"][..., :27].any()


def test_the_report_describes_the_data(raw: Path) -> None:
    site_file(raw, "spacing: [0.5, 0.5]\nnotes: scanner A\n")

    report = prepare(raw).report

    assert report["sizes"] == {"height": [24, 24], "width": [20, 20]}
    assert report["class_shares"]["1"] == pytest.approx(64 / 480)
    assert sum(report["class_shares"].values()) == pytest.approx(1)
    assert report["intensity"]["kinds"] == {"uint8 grey": 10}
    assert (report["spacing"], report["notes"]) == ([0.5, 0.5], "scanner A")


def test_the_same_folder_gives_the_same_bytes_and_stays_as_it_is(raw: Path) -> None:
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}

    first, second = prepare(raw), prepare(raw)

    pd.testing.assert_frame_equal(first.manifest, second.manifest)
    assert first.report == second.report
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    assert {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()} == before


def test_formats_depths_and_colours_mix_within_a_site(raw: Path) -> None:
    add(raw, "deep", np.random.default_rng(1).integers(0, 65_536, (24, 20), dtype=np.uint16), spot(), ".tif")
    add(raw, "colour", scan(2, (24, 20, 3)), spot(1))
    add(raw, "photo", scan(3), spot(), ".jpg")

    prepared = prepare(raw)

    assert prepared.report["intensity"]["kinds"] == {"uint16 grey": 1, "uint8 RGB": 1, "uint8 grey": 11}
    rows = prepared.manifest.set_index("image")["row"]
    grey, colour = (prepared.arrays["images"][rows[f"images/{name}"]] for name in ("deep.tif", "colour.png"))
    assert (grey[0] == grey[1]).all()
    assert (grey[0] == grey[2]).all()
    assert (colour[0] != colour[1]).any()


def test_multi_class_masks_keep_their_classes(raw: Path) -> None:
    mask = spot(1)
    mask[18:22] = 2
    add(raw, "two", scan(50), mask)

    prepared = prepare(raw, CONFIG.model_copy(update={"classes": 2}))

    assert set(np.unique(prepared.arrays["masks"][prepared.manifest["image"] == "images/two.png"])) == {0, 1, 2}


def test_rgb_palette_and_grey_masks_mix_within_a_site_and_the_manifest_says_what_was_applied(raw: Path) -> None:
    (raw / SITE / "images").mkdir(exist_ok=True)
    for stem in ("rgb", "palette"):
        save(raw / SITE / "images" / f"{stem}.png", scan(30 + len(stem)))
    painted = np.zeros((24, 20, 3), np.uint8)
    painted[8:16, 4:12] = 255, 128, 0
    save(raw / SITE / "masks" / "rgb.bmp", painted)
    indexed = Image.fromarray(spot(7)).convert("P")
    indexed.putpalette([0, 0, 0] * 7 + [255, 128, 0])
    indexed.save(raw / SITE / "masks" / "palette.png")
    site_file(raw, "label_map: {255: 1, '#FF8000': 2}\n")

    prepared = prepare(raw, CONFIG.model_copy(update={"classes": 2}))

    rows = prepared.manifest.set_index("image")
    held = {name: np.unique(prepared.arrays["masks"][row]).tolist() for name, row in rows["row"].items()}
    assert (held["images/rgb.png"], held["images/palette.png"], held["images/p0_0.png"]) == ([0, 2], [0, 2], [0, 1])
    assert json.loads(rows.loc["images/rgb.png", "label_map"]) == {"#ff8000": 2}
    assert json.loads(rows.loc["images/p0_0.png", "label_map"]) == {"255": 1}


def test_the_manifest_names_the_classes_of_each_image_and_the_report_those_that_are_not_there(raw: Path) -> None:
    site_file(raw, "label_map: {255: 1}\n")
    config = CONFIG.model_copy(update={"classes": 3, "class_names": ("tumour", "cyst", "vessel")})
    for name, split in splits(prepare(raw, config)).items():
        if split == "test":
            save(raw / SITE / "masks" / Path(name).name, spot(3))
    save(raw / SITE / "masks" / "p0_0.png", spot(0))

    prepared = prepare(raw, config)

    told = dict(zip(prepared.manifest["image"], prepared.manifest["classes"], strict=True))
    assert told["images/p0_0.png"] == "[]"
    assert {told[name] for name, split in splits(prepared).items() if split == "test"} - {"[]"} == {"[3]"}
    assert prepared.report["warnings"] == [
        "cyst: in no mask, so it is neither trained nor scored here",
        "vessel: in no mask of training and validation, so it is scored here, but never predicted",
    ]
    with_column = stored(prepared.manifest)
    save_file(dict(prepared.arrays), raw.parent / "north.safetensors")
    assert SiteArrays(raw.parent / "north.safetensors", with_column).classes() == (1, 3)


def test_a_label_map_turns_raw_values_into_classes(raw: Path) -> None:
    mask = spot(128)
    mask[18:22] = 40
    add(raw, "mapped", scan(50), mask)
    site_file(raw, "label_map: {255: 1, 128: 2, 40: 0}\n")

    prepared = prepare(raw, CONFIG.model_copy(update={"classes": 2}))

    row = prepared.manifest.set_index("image").loc["images/mapped.png"]
    assert json.loads(row["label_map"]) == {"255": 1, "128": 2, "40": 0}
    assert set(np.unique(prepared.arrays["masks"][row["row"]])) == {0, 2}


def test_two_valued_masks_of_255_need_no_map_and_say_so(raw: Path) -> None:
    prepared = prepare(raw)

    assert set(np.unique(prepared.arrays["masks"])) == {0, 1}
    assert set(prepared.manifest["label_map"]) == {'{"255": 1}'}


def write_huge_frame(raw: Path) -> None:
    save(raw / SITE / "masks" / "p0_0.png", spot(shape=(20, 24)))


def write_nan(raw: Path) -> None:
    (raw / SITE / "images" / "p0_0.png").unlink()
    save(raw / SITE / "images" / "p0_0.tif", np.full((24, 20), np.nan, np.float32))


BREAKS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "unreadable": (
        lambda raw: (raw / SITE / "images" / "p0_0.png").write_bytes(b"\x89PNG\r\n\x1a\n junk"),
        "images/p0_0.png",
        "cannot be read",
    ),
    "empty file": (
        lambda raw: (raw / SITE / "masks" / "p0_0.png").write_bytes(b""),
        "masks/p0_0.png",
        "the file is empty",
    ),
    "missing mask": (
        lambda raw: (raw / SITE / "masks" / "p0_0.png").unlink(),
        "images/p0_0.png",
        "image without a mask",
    ),
    "missing image": (
        lambda raw: (raw / SITE / "images" / "p0_0.png").unlink(),
        "masks/p0_0.png",
        "mask without an image",
    ),
    "size mismatch": (write_huge_frame, "masks/p0_0.png", "is 20 x 24 pixels"),
    "unknown label": (
        lambda raw: save(raw / SITE / "masks" / "p0_0.png", spot(7)),
        "masks/p0_0.png",
        "unknown label value 7",
    ),
    "nan": (write_nan, "images/p0_0.tif", "holds NaN or infinite"),
    "duplicate": (lambda raw: add(raw, "zz", scan(0), spot()), "images/zz.png", "the same picture as images/p0_0.png"),
    "duplicate in another format": (
        lambda raw: add(raw, "zz", scan(0), spot(), ".tif"),
        "images/zz.tif",
        "the same picture as images/p0_0.png",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_sample_stops_the_run_and_is_named_with_its_cure(raw: Path, case: str) -> None:
    damage, file, reason = BREAKS[case]
    damage(raw)

    with pytest.raises(DataError) as stop:
        prepare(raw)

    assert f"{SITE}/{file}: {reason}" in str(stop.value)
    assert "on_bad_sample: quarantine" in str(stop.value)


@pytest.mark.parametrize("case", BREAKS)
def test_a_quarantined_sample_is_left_out_and_listed(raw: Path, case: str) -> None:
    damage, file, reason = BREAKS[case]
    damage(raw)

    prepared = prepare(raw, QUARANTINE)

    (entry,) = prepared.report["broken"]
    assert entry["file"] == file
    assert reason in entry["reason"]
    assert entry["cure"]
    assert file not in {*prepared.manifest["image"], *prepared.manifest["mask"]}
    assert len(prepared.manifest) == len(prepared.arrays["images"]) == prepared.report["counts"]["used"]
    assert prepared.manifest["row"].tolist() == list(range(len(prepared.manifest)))


def test_dropping_a_duplicate_keeps_the_other_rows_right(raw: Path) -> None:
    before = prepare(raw)
    add(raw, "p0_00", scan(4), spot())

    after = prepare(raw, QUARANTINE)

    assert [entry["file"] for entry in after.report["broken"]] == ["images/p2_4.png"]
    kept = after.manifest["image"].isin(before.manifest["image"])
    np.testing.assert_array_equal(
        after.arrays["images"][kept.to_numpy()],
        before.arrays["images"][(before.manifest["image"] != "images/p2_4.png").to_numpy()],
    )


def test_an_image_known_from_before_outlives_its_new_copy(raw: Path) -> None:
    before = prepare(raw)
    add(raw, "a_copy", scan(4), spot())

    after = prepare(raw, QUARANTINE, previous_manifest=before.manifest)

    assert [entry["file"] for entry in after.report["broken"]] == ["images/a_copy.png"]


def test_copies_within_one_subject_are_kept_with_a_warning(raw: Path) -> None:
    site_file(raw, 'group: "^(p[0-9]+)_"')
    add(raw, "p0_copy", scan(0), spot())

    prepared = prepare(raw)

    assert prepared.report["counts"]["used"] == 11
    assert any("identical images of subject p0" in warning for warning in prepared.report["warnings"])


def test_many_files_with_one_fault_are_one_line_that_says_where_each_is(raw: Path) -> None:
    for number in range(30):
        save(raw / SITE / "images" / f"x{number:02d}.png", scan(number))
    save(raw / SITE / "masks" / "p0_0.png", spot(7))

    with pytest.raises(DataError, match="31 files cannot be used") as stop:
        prepare(raw)

    _, common, single, where, cure = str(stop.value).splitlines()
    names = ", ".join(f"{SITE}/images/x0{number}.png" for number in range(3))
    assert common.startswith(f"  30 files alike ({names}, ...): image without a mask; add masks/x00.png")
    assert single.startswith(f"  {SITE}/masks/p0_0.png: unknown label value 7")
    assert f"08_reporting/data_report/{SITE}.json" in where
    assert cure.startswith("Fix them")


def test_too_few_usable_images_stop_the_run_also_in_quarantine(raw: Path) -> None:
    for path in sorted((raw / SITE / "masks").iterdir())[3:]:
        path.unlink()

    with pytest.raises(DataError, match=r"north: 3 usable images.*min_images is 4.*\n  7 files alike \(north/images"):
        prepare(raw, QUARANTINE)


def test_empty_masks_are_counted_negatives(raw: Path) -> None:
    add(raw, "clear", scan(60), spot(0))

    prepared = prepare(raw)

    assert prepared.report["empty_masks"] == 1
    assert "images/clear.png" in splits(prepared)


def test_empty_masks_are_broken_where_they_are_not_allowed(raw: Path) -> None:
    add(raw, "clear", scan(60), spot(0))

    with pytest.raises(DataError, match=r"masks/clear\.png: empty mask; label it, or set .*allow_empty_masks"):
        prepare(raw, CONFIG.model_copy(update={"allow_empty_masks": False}))


def test_a_site_of_empty_masks_is_broken_in_any_case(raw: Path) -> None:
    for path in (raw / SITE / "masks").iterdir():
        save(path, spot(0))

    with pytest.raises(DataError, match="site north: all 10 masks are empty"):
        prepare(raw, QUARANTINE)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_site_without_images_or_masks_is_named(raw: Path, kind: str) -> None:
    (raw / SITE / kind).rename(raw / SITE / "parked")

    with pytest.raises(DataError, match=f"north: no {kind} folder"):
        prepare(raw)


def test_a_site_that_is_not_there_is_named(raw: Path) -> None:
    with pytest.raises(DataError, match="no such site folder"):
        prepare_site(raw, "south", CONFIG, 0)


def test_a_constant_image_and_a_vanishing_class_are_warned_of(raw: Path) -> None:
    add(raw, "flat", np.full((24, 20), 9, np.uint8), spot())
    speck = np.zeros((400, 400), np.uint8)
    speck[0, 0] = 255
    add(raw, "speck", scan(9, (400, 400)), speck)

    warnings = prepare(raw).report["warnings"]

    assert any(warning.startswith("images/flat.png: constant image") for warning in warnings)
    assert any(warning.startswith("images/speck.png: its mask loses class 1") for warning in warnings)


@pytest.mark.parametrize(
    "rule",
    ['group: "^(p[0-9]+)_"', "subjects: {" + ", ".join(f"p{n // 2}_{n}: p{n // 2}" for n in range(10)) + "}"],
)
def test_patients_never_stand_in_two_splits(raw: Path, rule: str) -> None:
    site_file(raw, rule)

    for seed in range(10):
        manifest = prepare(raw, seed=seed).manifest
        assert len(manifest[["subject", "split"]].drop_duplicates()) == manifest["subject"].nunique()
        assert manifest["subject"].nunique() == 5


def test_a_stem_without_a_subject_is_broken_and_a_subject_without_a_stem_is_warned_of(raw: Path) -> None:
    names = ", ".join(f"p{n // 2}_{n}: s{n}" for n in range(1, 10))
    site_file(raw, f"subjects: {{{names}, gone: s77}}")

    report = prepare(raw, QUARANTINE).report

    assert [entry["file"] for entry in report["broken"]] == ["images/p0_0.png"]
    assert any("1 stem without an image: gone" in warning for warning in report["warnings"])


def test_counts_beyond_what_is_there_are_cut_and_said(raw: Path) -> None:
    report = prepare(raw, CONFIG.model_copy(update={"split": SplitConfig(validation=3, test=30)})).report

    assert [report["counts"][split] for split in ("validation", "test", "train")] == [3, 6, 1]
    assert report["warnings"] == ["split: 30 test images requested, 6 available"]


def test_overrides_hold_for_their_site_only(raw: Path) -> None:
    (raw / SITE).rename(raw / "south")
    for number in range(10):
        add(raw, str(number), scan(100 + number), spot())
    config = CONFIG.model_copy(
        update={"split": SplitConfig(validation=2, test=3, max_train=4, overrides={"south": {"test": 5}})}
    )

    assert prepare(raw, config).report["counts"]["test"] == 3
    assert prepare_site(raw, "south", config, 0).report["counts"]["test"] == 5
    assert prepare(raw, config).report["counts"]["unused"] == 1


def test_a_previous_manifest_read_from_disk_keeps_every_split(raw: Path) -> None:
    before = prepare(raw)
    for number in range(20):
        add(raw, f"{number:03d}", scan(200 + number), spot())

    after = prepare(raw, previous_manifest=stored(before.manifest))

    assert {image: splits(after)[image] for image in splits(before)} == splits(before)
    assert (before.report["split"]["drawn"], after.report["split"]["drawn"]) == ("new", "kept")


def test_a_renamed_image_keeps_its_split(raw: Path) -> None:
    before = prepare(raw)
    held_out = [image for image, split in splits(before).items() if split == "test"]
    for image in held_out:
        for path in (raw / SITE / image, raw / SITE / image.replace("images", "masks")):
            path.rename(path.with_name(f"renamed_{path.name}"))

    after = splits(prepare(raw, previous_manifest=before.manifest))

    assert {after[image.replace("images/", "images/renamed_")] for image in held_out} == {"test"}


@pytest.mark.parametrize("change", ["seed", "validation", "group"])
def test_under_other_settings_the_split_is_drawn_anew_and_said(raw: Path, change: str) -> None:
    before = prepare(raw).manifest
    if change == "group":
        site_file(raw, 'group: "^(p[0-9]+)_"')
    config = (
        CONFIG.model_copy(update={"split": SplitConfig(validation=3, test=3)}) if change == "validation" else CONFIG
    )

    after = prepare(raw, config, seed=int(change == "seed"), previous_manifest=before)

    pd.testing.assert_frame_equal(after.manifest, prepare(raw, config, seed=int(change == "seed")).manifest)
    assert any("drawn again" in warning for warning in after.report["warnings"])


def test_a_foreign_previous_manifest_does_not_bind(raw: Path) -> None:
    foreign = pd.DataFrame({"image": ["images/p0_0.png"], "split": ["test"]})

    assert prepare(raw, previous_manifest=foreign).report["split"]["drawn"] == "anew"


def test_regrouping_that_joins_two_splits_is_refused(raw: Path) -> None:
    rule = "subjects: {" + ", ".join(f"p{n // 2}_{n}: s{n}" for n in range(10)) + "}"
    site_file(raw, rule)
    before = prepare(raw)
    by_split = before.manifest.groupby("split")["subject"].first()
    site_file(raw, rule.replace(f": {by_split['test']}", f": {by_split['train']}"))

    with pytest.raises(DataError, match=r"was in test and train before.*delete the site's stored manifest"):
        prepare(raw, previous_manifest=before.manifest)


def test_what_is_written_is_read_back_by_split(raw: Path, tmp_path: Path) -> None:
    prepared = prepare(raw)
    save_file(dict(prepared.arrays), tmp_path / "north.safetensors")

    site = SiteArrays(tmp_path / "north.safetensors", stored(prepared.manifest))
    images, masks, valid = site.batch(site.rows("test"))

    rows = prepared.manifest.loc[prepared.manifest["split"] == "test", "row"]
    np.testing.assert_array_equal(images, prepared.arrays["images"][rows])
    np.testing.assert_array_equal(masks, prepared.arrays["masks"][rows])
    assert valid.sum() == len(rows) * 32 * 27


@pytest.mark.real_data
def test_all_nuclei_sites_prepare_without_a_broken_file(nuclei_root: Path) -> None:
    sites = discover_sites(nuclei_root)

    counts = {site: prepare_site(nuclei_root, site, PreprocessingConfig(), 0).report["counts"] for site in sites}

    assert len(sites) == 7
    assert sum(count["used"] for count in counts.values()) == 428
    assert all(count["broken"] == 0 for count in counts.values())


@pytest.mark.real_data
def test_the_benchmarks_counts_come_out_on_the_nuclei_sites(nuclei_root: Path) -> None:
    split = SplitConfig(
        validation=12, test=30, max_train=32, overrides={"tissue_white_320": {"validation": 6, "test": 12}}
    )
    config = PreprocessingConfig(split=split)

    counts = {
        site: prepare_site(nuclei_root, site, config, 0).report["counts"] for site in ("tissue_white_320", "fluo_256")
    }

    assert [counts["tissue_white_320"][name] for name in ("validation", "test", "train", "unused")] == [6, 12, 20, 0]
    assert [counts["fluo_256"][name] for name in ("validation", "test", "train", "unused")] == [12, 30, 32, 38]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_tags_of_image_and_mask_that_differ_are_told(raw: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for number in range(10):
        turned = raw / SITE / "images" / f"p{number // 2}_{number}.png"
        turned.unlink()
        Image.fromarray(scan(number)).save(turned.with_suffix(suffix), exif=exif)
    told = "its Orientation tag is 3, that of its mask 1; each is turned by its own tag"

    report = prepare(raw).report

    assert f"images/p0_0{suffix}: {told}" in "\n".join(report["warnings"])
    (alert,) = report["alerts"]
    assert alert.startswith(f"10 files (images/p0_0{suffix}, images/p0_1{suffix}, images/p1_2{suffix}, ...): {told}")
    assert f"{SITE}: {alert}" in caplog.messages


def test_a_site_whose_files_agree_has_no_alerts(raw: Path) -> None:
    assert prepare(raw).report["alerts"] == []


def test_a_class_that_resizing_loses_in_every_mask_is_told_with_the_size_that_keeps_it(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10):
        mask = np.zeros((480, 400), np.uint8)
        mask[100:200, 100:200] = 1
        mask[300 : 301 + 2 * (number == 9), 300] = 2
        add(raw, f"p{number // 2}_{number}", scan(number, (480, 400)), mask)
    config = CONFIG.model_copy(update={"classes": 2, "class_names": ("organ", "lesion")})

    report = prepare(raw, config).report

    (alert,) = report["alerts"]
    assert alert == (
        "lesion: resizing to 32 pixels loses it in 10 masks, all that show it, so it is not learned here; "
        f"preprocessing.image_size={alert.split('image_size=')[1].split()[0]} keeps it in each"
    )
    assert f"{SITE}: {alert}" in caplog.messages
    kept = int(alert.split("image_size=")[1].split()[0])
    assert prepare(raw, config.model_copy(update={"image_size": kept})).report["alerts"] == []
    assert 64 <= kept <= 512


def test_a_class_that_one_mask_keeps_is_not_told(raw: Path) -> None:
    for number in range(10):
        mask = np.zeros((480, 400), np.uint8)
        mask[100:200, 100:200] = 1
        side = 100 if number == 9 else 1
        mask[300 : 300 + side, 300 : 300 + side] = 2
        add(raw, f"p{number // 2}_{number}", scan(number, (480, 400)), mask)

    report = prepare(raw, CONFIG.model_copy(update={"classes": 2})).report

    assert report["alerts"] == []
    assert sum("loses class 2" in warning for warning in report["warnings"]) == 9


def test_one_of_a_thing_is_singular(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for number in range(1, 10):
        for kind in ("images", "masks"):
            (raw / SITE / kind / f"p{number // 2}_{number}.png").unlink()
    with pytest.raises(DataError, match="1 usable image, preprocessing"):
        prepare(raw)
    with pytest.raises(DataError, match=r"\(1 image of 1 subject\)"):
        prepare(raw, CONFIG.model_copy(update={"min_images": 1}))


POINTERS = {
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
    "git annex get": b"/annex/objects/SHA256E-s12345--" + b"0" * 64 + b".png\n",
}


@pytest.mark.parametrize(
    "name", ["images/p0_0.png", "masks/p0_0.png", "images/x.tif", "images/x.nii.gz", "images/x.jpg"]
)
@pytest.mark.parametrize("command", POINTERS)
def test_a_pointer_in_the_place_of_a_file_is_named_with_its_command(raw: Path, name: str, command: str) -> None:
    (raw / SITE / name).write_bytes(POINTERS[command])
    if name.startswith("images/x"):
        (raw / SITE / "masks" / f"x{name.removeprefix('images/x').replace('.jpg', '.png')}").write_bytes(b"?")

    (broken,) = prepare(raw, QUARANTINE).report["broken"]

    assert broken["file"] == name
    assert broken["reason"].startswith("this is a pointer of ")
    assert broken["cure"] == f"run {command}"


def test_a_mask_that_does_not_fit_names_the_tags_that_differ(raw: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (raw / SITE / "images" / "p0_0.png").unlink()
    Image.fromarray(scan(0)).save(raw / SITE / "images" / "p0_0.jpg", exif=exif)

    (broken,) = prepare(raw, QUARANTINE).report["broken"]

    assert broken["reason"] == (
        "is 24 x 20 pixels (rows x columns), its image upright is 20 x 24; "
        "its Orientation tag is 1, that of its image 6"
    )
