"""Raw data that cannot be used: each kind is named with its cure, and earlier results stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedsca_pipeline import load_site_model

SITE = "clinic"
# The smoke preset's working size: nothing is resized.
SIDE = 32


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_site(folder: Path, images: int = 8, seed: int = 0) -> None:
    """Write noise with a bright square, and its mask."""
    rng = np.random.default_rng(seed)
    for number in range(images):
        image, mask = rng.integers(0, 100, (SIDE, SIDE), np.uint8), np.zeros((SIDE, SIDE), np.uint8)
        top, left = rng.integers(2, 18, 2)
        image[top : top + 12, left : left + 12] += 120
        mask[top : top + 12, left : left + 12] = 1
        write(folder / "images" / f"p{number}.png", image)
        write(folder / "masks" / f"p{number}.png", mask)


def truncate_an_image(site: Path) -> None:
    path = site / "images" / "p3.png"
    path.write_bytes(path.read_bytes()[:200])


def lose_a_mask(site: Path) -> None:
    (site / "masks" / "p3.png").unlink()


def resize_a_mask(site: Path) -> None:
    write(site / "masks" / "p3.png", np.ones((SIDE, SIDE - 2), np.uint8))


def add_a_label(site: Path) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:4], mask[4:8] = 1, 7
    write(site / "masks" / "p3.png", mask)


def copy_an_image(site: Path) -> None:
    shutil.copy(site / "images" / "p0.png", site / "images" / "p3.png")


def keep_two_images(site: Path) -> None:
    for number in range(2, 8):
        (site / "images" / f"p{number}.png").unlink()
        (site / "masks" / f"p{number}.png").unlink()


def empty_every_mask(site: Path) -> None:
    for path in (site / "masks").iterdir():
        write(path, np.zeros((SIDE, SIDE), np.uint8))


def lose_the_masks(site: Path) -> None:
    shutil.rmtree(site / "masks")


def lose_the_images(site: Path) -> None:
    shutil.rmtree(site / "images")


def misspell_the_site_file(site: Path) -> None:
    (site / "site.yml").write_text("lable_map: {1: 1}\n")


Breakage = Callable[[Path], None]

SAMPLES: list[tuple[Breakage, str, str]] = [
    (truncate_an_image, "clinic/images/p3.png: cannot be read", "copy or export the file again"),
    (lose_a_mask, "clinic/images/p3.png: image without a mask", "add masks/p3.png"),
    (resize_a_mask, "clinic/masks/p3.png: is 32 x 30 pixels", "export both at one size"),
    (add_a_label, "clinic/masks/p3.png:", "label_map"),
    (copy_an_image, "clinic/images/p3.png: the same picture as images/p0.png", "delete one, or give both one subject"),
]
SITES: list[tuple[Breakage, str, str]] = [
    (keep_two_images, "site clinic: 2 usable images", "add images"),
    (empty_every_mask, "site clinic: all 8 masks are empty", "add labelled images"),
    (lose_the_masks, "clinic: no masks folder", "put the site's masks into"),
    (lose_the_images, "clinic: no images folder", "put the site's images into"),
    (misspell_the_site_file, "site.yml", "lable_map"),
]


@pytest.fixture(scope="module")
def prepared(new_workplace):
    """A workplace in which one good site has been preprocessed."""
    place = new_workplace()
    write_site(place.raw / SITE)
    done = place.run("preprocessing")
    assert done.code == 0, done.output
    return place


@pytest.fixture
def place(prepared, tmp_path: Path):
    return prepared.moved(tmp_path / "place")


def ids(cases: list[tuple[Breakage, str, str]]) -> list[str]:
    return [breakage.__name__ for breakage, _, _ in cases]


@pytest.mark.parametrize(("breakage", "fault", "cure"), SAMPLES + SITES, ids=ids(SAMPLES + SITES))
def test_what_is_broken_is_named_with_its_cure_and_earlier_outputs_stay(
    place, breakage: Breakage, fault: str, cure: str
) -> None:
    breakage(place.raw / SITE)
    before = place.contents()

    refused = place.run("preprocessing")

    assert refused.code == 1
    assert fault in refused.words
    assert cure in refused.words
    assert "Traceback" not in refused.output
    changed = {
        path for path in before.keys() | place.contents().keys() if before.get(path) != place.contents().get(path)
    }
    assert changed <= {"02_intermediate/demo_sites.json"}


@pytest.mark.parametrize(("breakage", "fault", "cure"), SAMPLES, ids=ids(SAMPLES))
def test_with_quarantine_the_run_goes_on_and_the_report_lists_the_file(
    place, breakage: Breakage, fault: str, cure: str
) -> None:
    breakage(place.raw / SITE)
    raw = place.contents("01_raw")

    done = place.run("preprocessing", "preprocessing.on_bad_sample=quarantine")

    report = json.loads(place.report(SITE).read_text())
    manifest = pd.read_csv(place.manifest(SITE))
    listed = " ".join(f"{SITE}/{entry['file']}: {entry['reason']}; {entry['cure']}" for entry in report["broken"])
    assert done.code == 0, done.output
    assert fault in listed
    assert cure in listed
    assert "p3.png" in done.words
    assert "images/p3.png" not in set(manifest["image"])
    assert len(manifest) == report["counts"]["used"] == 7
    assert place.contents("01_raw") == raw


@pytest.fixture
def faulty(place):
    """A place with 40 images more, of which none has a mask, and a mask that is too narrow."""
    for number in range(40):
        write(place.raw / SITE / "images" / f"x{number:02d}.png", np.full((SIDE, SIDE), number, np.uint8))
    resize_a_mask(place.raw / SITE)
    return place


def test_a_fault_of_many_files_is_printed_once_and_the_data_report_has_each(faulty) -> None:
    refused = faulty.run("preprocessing")
    told = faulty.run("data_report", "data_report.embedding=false,data_report.thumbnails=0")

    assert (refused.code, told.code) == (1, 1)
    assert f"site {SITE}: 41 files cannot be used" in refused.words
    assert refused.words.count("image without a mask") == 1
    names = ", ".join(f"{SITE}/images/x0{number}.png" for number in range(3))
    assert f"40 files alike ({names}, ...): image without a mask" in refused.words
    assert f"{SITE}/masks/p3.png: is 32 x 30 pixels" in refused.words
    assert f"then 08_reporting/data_report/{SITE}.json" in refused.words
    facts = json.loads((faulty.reporting / "data_report" / f"{SITE}.json").read_text())
    assert len(facts["broken"]) == 41
    assert not any("x00" in refusal for refusal in facts["refusals"])


def test_what_is_left_out_for_one_fault_is_printed_once_and_the_report_has_each(faulty) -> None:
    done = faulty.run("preprocessing", "preprocessing.on_bad_sample=quarantine")

    assert done.code == 0, done.output
    assert done.words.count("image without a mask") == 1
    assert "40 files alike (images/x00.png, images/x01.png, images/x02.png, ...): image without a mask" in done.words
    assert "each file is listed in the site's report.json" in done.words
    assert len(json.loads(faulty.report(SITE).read_text())["broken"]) == 41


@pytest.mark.parametrize(("breakage", "fault", "cure"), SITES[:2], ids=ids(SITES[:2]))
def test_quarantine_does_not_excuse_a_site_without_usable_images(
    place, breakage: Breakage, fault: str, cure: str
) -> None:
    breakage(place.raw / SITE)

    refused = place.run("preprocessing", "preprocessing.on_bad_sample=quarantine")

    assert refused.code == 1
    assert fault in refused.words
    assert cure in refused.words


def test_an_empty_mask_is_a_valid_negative(place) -> None:
    write(place.raw / SITE / "masks" / "p3.png", np.zeros((SIDE, SIDE), np.uint8))

    done = place.run("preprocessing")

    assert done.code == 0, done.output
    assert json.loads(place.report(SITE).read_text())["empty_masks"] == 1


def test_a_site_name_that_cannot_be_a_name_is_refused_with_a_better_one(place) -> None:
    write_site(place.raw / "St. Mary's")

    refused = place.run("preprocessing")

    assert refused.code == 1
    assert "rename the folder" in refused.words
    assert "St_Mary_s" in refused.words
    assert "Traceback" not in refused.output


def test_a_broken_site_stops_a_whole_run_before_training(place) -> None:
    truncate_an_image(place.raw / SITE)

    refused = place.run("federated_training")

    assert refused.code == 1
    assert "clinic/images/p3.png" in refused.words
    assert "Traceback" not in refused.output
    assert not place.models.exists()
    assert place.parents() == []


def test_without_a_site_folder_the_demonstration_sites_are_written(workplace) -> None:
    done = workplace.run("demo_sites", "demo_sites.images_per_site=4")

    sites = sorted(folder.name for folder in workplace.raw.iterdir())
    assert done.code == 0, done.output
    assert sites == ["harbour_ct", "meadow_mri", "summit_ultrasound", "valley_endoscopy"]
    assert f"demonstration data, phantoms and no patients: {', '.join(sites)}" in done.words
    assert "to train on your own data, delete them" in done.words
    for site in sites:
        images, masks = (
            {path.stem for path in (workplace.raw / site / kind).iterdir()} for kind in ("images", "masks")
        )
        assert len(images) == 4
        assert images == masks
    assert workplace.partial_files() == []


def test_own_sites_are_left_alone_by_the_demonstration(place) -> None:
    raw = place.contents("01_raw")

    done = place.run("demo_sites")

    assert done.code == 0, done.output
    assert "demonstration" not in done.words
    assert place.contents("01_raw") == raw


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory: pytest.TempPathFactory):
    """A workplace with one trained site, and what the command printed."""
    place = prepared.moved(tmp_path_factory.mktemp("trained") / "place")
    return place, place.run("federated_training")


def test_one_site_alone_trains_locally_with_a_warning(trained) -> None:
    place, done = trained

    table = json.loads((place.reporting / "final_table.json").read_text())
    (record, *_) = sorted((place.data / "07_model_output" / "rounds").glob("*/*.json"))
    assert done.code == 0, done.output
    assert "one site" in done.words
    assert "local training" in done.words
    assert SITE in table
    assert json.loads(record.read_text())["sites"][SITE]["self_weight"] == 1.0


def test_a_loaded_site_model_segments_as_evaluation_did(trained) -> None:
    place, _ = trained
    scores = pd.read_csv(place.test_scores(SITE), dtype={"image": str}).set_index(["model", "image"])["dice"]

    for name, folder in (("chosen", place.models / SITE), ("after", place.models / SITE / "last_round")):
        model = load_site_model(folder)
        for image, expected in scores[name].items():
            with Image.open(place.raw / SITE / "images" / f"{image}.png") as picture:
                predicted = model.segment(np.array(picture)) > 0
            with Image.open(place.raw / SITE / "masks" / f"{image}.png") as picture:
                truth = np.array(picture) > 0
            dice = 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())
            assert dice == pytest.approx(expected, abs=1e-6)
            assert predicted.any()
