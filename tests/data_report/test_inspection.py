"""A site is inspected as preprocessing would, but broken files are reported instead of stopping it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedsca_pipeline.config import DataReportConfig, PreprocessingConfig, SplitConfig
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data_report.across import across_sites
from fedsca_pipeline.data_report.inspection import Inspection, inspect_site, subject_hash
from fedsca_pipeline.data_report.page import render_site

CONFIG = PreprocessingConfig(image_size=64, split=SplitConfig(validation=2, test=3))
QUARANTINE = CONFIG.model_copy(update={"on_bad_sample": "quarantine"})
OPTIONS = DataReportConfig(thumbnails=6, embedded_images=4)


def inspect(
    raw: Path, site: str = "north", config: PreprocessingConfig = CONFIG, manifest: pd.DataFrame | None = None
) -> Inspection:
    return inspect_site(raw, site, config, 0, manifest, OPTIONS)


def stored(manifest: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(manifest.to_csv(index=False)), dtype=dict(MANIFEST_DTYPES), keep_default_na=False)


def contents(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_facts_of_a_sound_site_include_its_preprocessing_report(raw: Path) -> None:
    report = prepare_site(raw, "north", CONFIG, 0).report

    facts = inspect(raw).facts

    assert {key: facts[key] for key in report} == report
    assert facts["refusals"] == []
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_an_inspection_writes_nothing(raw: Path) -> None:
    before = contents(raw.parent)

    inspect(raw)

    assert contents(raw.parent) == before


def test_a_broken_file_is_listed_and_refuses_the_site_unless_quarantine_is_allowed(raw: Path) -> None:
    (raw / "north" / "masks" / "north03.png").unlink()

    strict, lenient = inspect(raw).facts, inspect(raw, config=QUARANTINE).facts

    assert strict["broken"] == lenient["broken"]
    assert strict["broken"][0]["file"] == "images/north03.png"
    assert strict["counts"]["used"] == lenient["counts"]["used"] == 9
    assert lenient["refusals"] == []
    (refusal,) = strict["refusals"]
    assert refusal.startswith("1 file cannot be used")
    assert "quarantine" in refusal


def lose_the_masks(site: Path) -> None:
    shutil.rmtree(site / "masks")


def lose_the_images(site: Path) -> None:
    shutil.rmtree(site / "images")


def empty_every_mask(site: Path) -> None:
    for path in (site / "masks").iterdir():
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)


def keep_two_images(site: Path) -> None:
    for number in range(2, 10):
        (site / "images" / f"north{number:02d}.png").unlink()
        (site / "masks" / f"north{number:02d}.png").unlink()


def misspell_the_site_file(site: Path) -> None:
    (site / "site.yml").write_text("lable_map: {1: 1}\n")


def break_every_file(site: Path) -> None:
    for path in (site / "images").iterdir():
        path.write_bytes(b"no image")


@pytest.mark.parametrize(
    ("breakage", "why", "used"),
    [
        (lose_the_masks, "no masks folder; put the site's masks into north/masks", 0),
        (lose_the_images, "no images folder; put the site's images into north/images", 0),
        (empty_every_mask, "all 10 masks are empty", 10),
        (keep_two_images, "2 usable images", 2),
        (misspell_the_site_file, "north/site.yml: lable_map", 0),
        (break_every_file, "0 usable images", 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_refused_site_has_its_reason_in_one_line_and_a_full_inspection(
    raw: Path, breakage: Callable[[Path], None], why: str, used: int
) -> None:
    breakage(raw / "north")

    found = inspect(raw, config=QUARANTINE)

    assert why in found.facts["refusals"][0]
    assert "\n" not in "".join(found.facts["refusals"])
    assert str(raw) not in json.dumps(found.facts)
    assert found.facts["counts"]["used"] == used
    assert len(found.pictures) == min(used, OPTIONS.thumbnails)
    assert len(found.embedded.images) == min(used, OPTIONS.embedded_images)


def test_a_copy_in_another_split_is_found_and_comes_first(raw: Path, add_image: Callable[..., None]) -> None:
    splits = {image["image"]: image["split"] for image in inspect(raw).facts["images"]}
    test = next(image for image, split in splits.items() if split == "test")
    with Image.open(raw / "north" / test) as picture:
        darker = (np.asarray(picture) * 0.7).astype(np.uint8)
    # Of several copies at least one is in another split.
    for number in range(4):
        add_image("north", f"copy{number}.png", darker + np.uint8(number))

    (group,) = inspect(raw, config=QUARANTINE).facts["near_duplicates"]

    assert {image["image"] for image in group["images"]} == {test, *(f"images/copy{n}.png" for n in range(4))}
    assert group["across_splits"] == (len({image["split"] for image in group["images"]}) > 1)
    assert group["across_splits"]


def test_similar_images_of_one_subject_are_not_near_duplicates(
    raw: Path, add_image: Callable[..., None], scene
) -> None:
    for number in range(3):
        add_image("north", f"p7_{number}.png", scene(7000, 64) // 2 + np.uint8(number))
    (raw / "north" / "site.yml").write_text(r"group: '^(p7|north\d\d)'")

    assert inspect(raw).facts["near_duplicates"] == []


def test_near_duplicates_have_pictures(raw: Path, add_image: Callable[..., None], scene) -> None:
    add_image("north", "copy.png", scene(3, 64) // 2)

    found = inspect(raw)

    assert set(found.duplicates) == {"images/north03.png", "images/copy.png"}


def test_a_subject_whose_images_are_in_two_splits_of_the_stored_manifest_is_reported(raw: Path) -> None:
    images = [f"north{number:02d}" for number in range(10)]
    subjects = {stem: stem for stem in images}
    (raw / "north" / "site.yml").write_text(json.dumps({"subjects": subjects}))
    manifest = stored(prepare_site(raw, "north", CONFIG, 0).manifest)
    train, test = (manifest.loc[manifest["split"] == split, "image"].iloc[0] for split in ("train", "test"))
    (raw / "north" / "site.yml").write_text(
        json.dumps({"subjects": subjects | {Path(train).stem: "one", Path(test).stem: "one"}})
    )

    facts = inspect(raw, manifest=manifest).facts

    (torn,) = facts["torn_subjects"]
    assert {(image["image"], image["split"]) for image in torn["images"]} == {(train, "train"), (test, "test")}
    assert torn["subject"] == subject_hash("one")
    assert "before its images were regrouped" in facts["refusals"][0]


def test_the_split_shown_is_the_stored_one(raw: Path) -> None:
    other = CONFIG.model_copy(update={"split": SplitConfig(validation=3, test=2)})
    manifest = prepare_site(raw, "north", CONFIG, 0).manifest

    kept, anew = inspect(raw, manifest=manifest).facts, inspect(raw, config=other, manifest=manifest).facts

    assert {image["image"]: image["split"] for image in kept["images"]} == dict(
        zip(manifest["image"], manifest["split"], strict=True)
    )
    assert (kept["split"]["drawn"], anew["split"]["drawn"]) == ("kept", "anew")


@pytest.mark.parametrize(
    ("names", "rule", "found"),
    [
        ([f"p{number // 3}_{number}" for number in range(12)], "", True),
        ([f"p{number // 3}_{number}" for number in range(12)], "group: '^(p\\d+)_'", False),
        ([f"scan_{number}" for number in range(12)], "", False),
        ([f"{number}_scan" for number in range(12)], "", False),
    ],
)
def test_names_that_suggest_several_images_per_patient_are_reported(
    tmp_path: Path, add_image: Callable[..., None], names: list[str], rule: str, found: bool
) -> None:
    for seed, name in enumerate(names):
        add_image("clinic", f"{name}.png", seed)
    (tmp_path / "raw" / "clinic" / "site.yml").write_text(rule)

    assert (inspect(tmp_path / "raw", "clinic").facts["grouped_names"] is not None) == found


def test_facts_of_an_image_of_a_single_colour_have_no_hash(raw: Path, add_image: Callable[..., None]) -> None:
    for level in (10, 200):
        add_image("north", f"flat{level}.png", np.full((64, 64), level, np.uint8))

    facts = inspect(raw).facts

    assert [image["hash"] is None for image in facts["images"]] == [
        "flat" in image["image"] for image in facts["images"]
    ]
    assert facts["near_duplicates"] == []


def test_intensities_are_the_raw_ones(tmp_path: Path, add_image: Callable[..., None], scene) -> None:
    for number in range(6):
        add_image("ct", f"{number}.png", scene(number, 64).astype(np.uint16) * 16 + 1000)

    facts = inspect(tmp_path / "raw", "ct").facts

    low, high = facts["intensity"]["range"]
    edges, shares = (facts["intensity_values"]["histogram"][key] for key in ("edges", "shares"))
    assert 1000 <= low <= edges[0] < facts["intensity_values"]["quantiles"]["50"] < edges[-1] <= high <= 1000 + 255 * 16
    assert 0.98 <= sum(shares) <= 1


def test_a_volume_is_one_image_shown_by_a_slice_with_a_class(tmp_path: Path, scene) -> None:
    for number in range(6):
        voxels = np.stack([scene(10 * number + place, 32) for place in range(8)], axis=2)
        classes = np.zeros(voxels.shape, np.uint8)
        classes[8:16, 8:16, 5:7] = 1
        for kind, values in (("images", voxels), ("masks", classes)):
            path = tmp_path / "raw" / "mri" / kind / f"v{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 0.5, 3.0, 1.0])), path)

    found = inspect(tmp_path / "raw", "mri")

    assert found.facts["counts"]["used"] == found.facts["volumes"]["count"] == 6
    assert found.facts["volumes"]["spacing_mm"]["slice"] == [3.0, 3.0]
    assert all(picture.slice is not None and picture.classes.any() for picture in found.pictures)
    assert len({image["hash"] for image in found.facts["images"]}) == 6


def test_subjects_are_compared_without_regard_to_case() -> None:
    assert subject_hash(" Pat-7") == subject_hash("pat-7 ") != subject_hash("pat-8")


def test_the_seed_chooses_what_is_shown(raw: Path) -> None:
    def shown(seed: int) -> list[str]:
        return [picture.image for picture in inspect_site(raw, "north", CONFIG, seed, None, OPTIONS).pictures]

    assert shown(0) == shown(0)
    assert any(shown(0) != shown(seed) for seed in range(1, 4))


def test_a_site_that_asks_for_hidden_names_is_refused_and_shows_none_of_them(raw: Path) -> None:
    (raw / "north" / "site.yml").write_text("hide_names: true\ngroup: '^(north..)'")

    found = inspect(raw)
    page = render_site(found, across_sites([found.facts], 32, []))

    for text in (json.dumps(found.facts), page, str([picture.image for picture in found.pictures])):
        assert "north03" not in text
    assert found.facts["counts"] | {"used": 0, "broken": 0} == found.facts["counts"]
    (refusal,) = found.facts["refusals"]
    assert "kedro run --pipeline=import_sites" in refusal


def test_the_page_of_an_imported_site_says_that_its_names_are_hashes(raw: Path) -> None:
    (raw / "north" / "site.yml").write_text("hashed_names: true\ngroup: '^(north..)'")

    found = inspect(raw)

    assert "private/north/names.csv" in render_site(found, across_sites([found.facts], 32, []))
    assert not found.facts["subjects_named"]


def test_a_site_with_an_unreadable_site_file_shows_no_name(raw: Path) -> None:
    (raw / "north" / "site.yml").write_text("hide_names: true\nlable_map: {1: 1}\n")

    assert "north03" not in json.dumps(inspect(raw).facts)
