"""``kedro run --pipeline=data_report``: what is wrong at every site, and status 1 where it stops training."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

SIDE = 32
HOSTILE = "<script>alert(1)</script>"
# Names of files hold no slash.
HOSTILE_NAME = "<script>alert(1)"


def picture(seed: int) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(4 * SIDE, 4 * SIDE)), 2)
    return np.interp(noise, (noise.min(), noise.max()), (0, 255)).astype(np.uint8)


def add(site: Path, name: str, image: np.ndarray) -> None:
    mask = np.zeros(image.shape, np.uint8)
    mask[: len(mask) // 4, : len(mask) // 4] = 1
    for kind, file, pixels in (("images", name, image), ("masks", f"{Path(name).stem}.png", mask)):
        (site / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(site / kind / file)


def write_sites(raw: Path) -> None:
    for start, site in ((0, "north"), (100, "south"), (200, "west")):
        for number in range(8):
            add(raw / site, f"{site}_{number}.png", picture(start + number))


class Tags(HTMLParser):
    """The names of a page's elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)


@pytest.fixture(scope="module")
def broken(new_workplace):
    """Three sites, of which one is sound, and the report of them; what there was before, and what the command said."""
    place = new_workplace()
    write_sites(place.raw)
    # The same picture at another size and brightness, at another site.
    add(place.raw / "north", "export.jpg", picture(100)[::2, ::2] // 2)
    damaged = place.raw / "north" / "images" / f"{HOSTILE_NAME}.png"
    damaged.write_bytes(b"no image")
    shutil.copy(place.raw / "north" / "masks" / "north_0.png", place.raw / "north" / "masks" / f"{HOSTILE_NAME}.png")
    (place.raw / "south" / "site.yml").write_text(json.dumps({"notes": HOSTILE}))
    shutil.rmtree(place.raw / "west" / "masks")
    before = place.contents()
    return place, before, place.run("data_report")


def folder(place) -> Path:
    return place.reporting / "data_report"


def test_it_ends_with_status_1_and_a_table_of_who_can_train(broken) -> None:
    _, _, done = broken

    assert done.code == 1
    assert "2 of 3 sites cannot train under the present parameters: north, west" in done.words
    assert "put the site's masks into west/masks" in done.words
    assert "Traceback" not in done.output


def test_it_writes_pages_and_facts_and_nothing_else(broken) -> None:
    place, before, _ = broken

    after = place.contents()

    changed = {path for path in after if before.get(path) != after[path]}
    pages = {f"{site}.{kind}" for site in ("north", "south", "west") for kind in ("html", "json", "png")}
    pages |= {"index.html", "index.json", "sites.csv", "map.json"}
    assert changed == {"02_intermediate/demo_sites.json", *(f"08_reporting/data_report/{page}" for page in pages)}
    assert place.partial_files() == []
    assert place.parents() == []


def test_each_fault_stands_in_the_report_with_its_cure(broken) -> None:
    place, _, _ = broken

    north, west = (json.loads((folder(place) / f"{site}.json").read_text()) for site in ("north", "west"))
    index = json.loads((folder(place) / "index.json").read_text())
    page = (folder(place) / "index.html").read_text()
    table = pd.read_csv(folder(place) / "sites.csv", index_col="site")
    (entry,) = north["broken"]
    assert (entry["file"], entry["cure"]) == (f"images/{HOSTILE_NAME}.png", "copy or export the file again")
    assert north["counts"]["used"] == 9
    assert west["refusals"] == ["no masks folder; put the site's masks into west/masks, one file per image"]
    assert index["refused"] == ["north", "west"]
    assert "copy or export the file again" in page
    assert table["trains"].to_dict() == {"north": "no", "south": "yes", "west": "no"}


def test_an_image_that_another_site_has_too_is_found(broken) -> None:
    place, _, _ = broken

    (group,) = json.loads((folder(place) / "index.json").read_text())["near_duplicates"]

    assert [(found["site"], found["image"]) for found in group["images"]] == [
        ("north", "images/export.jpg"),
        ("south", "images/south_0.png"),
    ]
    for site in ("north", "south"):
        assert "Images that other sites also have" in (folder(place) / f"{site}.html").read_text()


def test_no_page_runs_what_a_file_name_says(broken) -> None:
    place, _, _ = broken

    for path in folder(place).glob("*.html"):
        page = path.read_text()
        assert "script" not in Tags(page).names
        assert str(place.root) not in page
    assert "&lt;script&gt;alert(1).png" in (folder(place) / "north.html").read_text()


def test_the_distance_between_sites_is_measured_where_there_are_images(broken) -> None:
    place, _, _ = broken

    (pair,) = json.loads((folder(place) / "index.json").read_text())["distances"]

    assert pair["sites"] == ["north", "south"]
    assert 0 < pair["p"] <= 1


def test_a_patient_whom_site_yml_joins_across_stored_splits_is_named(workplace) -> None:
    write_sites(workplace.raw)
    subjects = {f"north_{number}": f"p{number}" for number in range(8)}
    site_file = workplace.raw / "north" / "site.yml"
    site_file.write_text(json.dumps({"subjects": subjects}))
    assert workplace.run("preprocessing").code == 0
    manifest = pd.read_csv(workplace.manifest("north"))
    train, test = (manifest.loc[manifest["split"] == split, "image"].iloc[0] for split in ("train", "test"))
    site_file.write_text(json.dumps({"subjects": subjects | {Path(train).stem: "p", Path(test).stem: "p"}}))
    before = workplace.contents("03_primary", "05_model_input", "02_intermediate")

    done = workplace.run("data_report", "data_report.embedding=false")

    (torn,) = json.loads((folder(workplace) / "north.json").read_text())["torn_subjects"]
    assert done.code == 1
    assert {(found["image"], found["split"]) for found in torn["images"]} == {(train, "train"), (test, "test")}
    assert "Subjects in two splits" in (folder(workplace) / "north.html").read_text()
    assert workplace.contents("03_primary", "05_model_input", "02_intermediate") == before


def test_sound_sites_need_no_foundation_and_end_with_status_0(workplace) -> None:
    write_sites(workplace.raw)

    done = workplace.run("data_report", "data_report.embedding=false,foundation.name=mobile_sam")

    assert done.code == 0, done.output
    assert "index.html" in done.words
    assert not any(workplace.foundations.rglob("*.safetensors"))
    assert "data_report.embedding is false" in (folder(workplace) / "index.html").read_text()


def test_without_a_foundation_the_rest_of_the_report_is_written(workplace, tmp_path: Path) -> None:
    write_sites(workplace.raw)

    done = workplace.run("data_report", f"foundation.name=sam,foundation.source={tmp_path / 'nowhere'}")

    assert done.code == 0, done.output
    assert "Not measured, because the foundation is not available" in (folder(workplace) / "index.html").read_text()


@pytest.mark.parametrize(
    ("params", "key"), [("data_report.thumbnail=3", "data_report.thumbnail"), ("data_report.embedded_images=1", "4")]
)
def test_a_wrong_parameter_is_refused_by_name(workplace, params: str, key: str) -> None:
    refused = workplace.run("data_report", params)

    assert refused.code == 1
    assert key in refused.words
    assert not folder(workplace).exists()
