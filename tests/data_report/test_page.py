"""Pages show the findings, are self-contained, and escape every file name."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.config import DataReportConfig, PreprocessingConfig
from fedsca_pipeline.data_report.across import across_sites
from fedsca_pipeline.data_report.distance import plane, site_distances
from fedsca_pipeline.data_report.figures import interactive_map
from fedsca_pipeline.data_report.inspection import Inspection, Picture, inspect_site
from fedsca_pipeline.data_report.page import Distances, render_index, render_site
from fedsca_pipeline.data_report.thumbnails import data_uri, outlined, sheet
from fedsca_pipeline.evaluation.figures import CLASS_COLOURS

HOSTILE = "<script>alert(1)</script>"
NAME = "<img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
OPTIONS = DataReportConfig(thumbnails=4, embedded_images=4)
NOT_MEASURED = Distances([], {}, 0.0, 4, "Not measured.")


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.elements if attribute in attributes]

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def inspect(raw: Path, *sites: str, classes: int = 1) -> list[Inspection]:
    config = PreprocessingConfig(image_size=64, classes=classes)
    return [inspect_site(raw, site, config, 0, None, OPTIONS) for site in sites]


def across(found: list[Inspection]) -> dict:
    return across_sites([site.facts for site in found], OPTIONS.near_duplicate_bits, ["St. Mary's"])


@pytest.fixture
def hostile(raw: Path, add_image: Callable[..., None], scene) -> list[Inspection]:
    """Sites with file names and notes that try to become markup, and with broken files."""
    stem = NAME.replace("/", "")
    add_image("north", f"{stem}.png", 50)
    add_image("north", f"{stem} copy.png", scene(50, 64) // 2)
    add_image("south", f"{stem} export.png", scene(50, 64) // 2)
    add_image("north", f"{stem} broken.png", 51)
    (raw / "north" / "images" / f"{stem} broken.png").write_bytes(b"no image")
    add_image("north", f"{stem} flat.png", np.zeros((64, 64), np.uint8))
    (raw / "south" / "site.yml").write_text(json.dumps({"notes": HOSTILE, "spacing": [0.5, 0.7]}))
    return inspect(raw, "north", "south")


def test_names_and_notes_are_text_and_never_markup(hostile: list[Inspection]) -> None:
    together = across(hostile)
    pages = [render_site(site, together) for site in hostile]
    pages.append(render_index([site.facts for site in hostile], together, NOT_MEASURED))

    for page in map(Page, pages):
        assert "script" not in page.tags()
        assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
        assert all(source.startswith("data:image/") for source in page.values("src") + page.values("srcset"))
    north, south, index = map(Page, pages)
    assert HOSTILE in south.text
    assert f"images/{NAME}.png" in north.text
    assert f"images/{NAME} broken.png" in north.text
    assert f"images/{NAME} broken.png" in index.text
    assert f"images/{NAME} export.png" in index.text
    assert "49" not in north.text.split(NAME)[0][-5:]


def test_a_page_makes_no_network_requests(hostile: list[Inspection]) -> None:
    pages = [render_site(site, across(hostile)) for site in hostile]

    for page in pages:
        assert "default-src 'none'" in "".join(Page(page).values("content"))
        assert all(link.split("#")[0] in ("index.html", "") for link in Page(page).values("href"))
        assert "url(" not in page
        assert "@import" not in page


def test_links_lead_to_existing_pages_and_sections(hostile: list[Inspection]) -> None:
    together = across(hostile)
    pages = {f"{site.facts['site']}.html": Page(render_site(site, together)) for site in hostile}
    pages["index.html"] = Page(render_index([site.facts for site in hostile], together, NOT_MEASURED))

    for page in pages.values():
        for link in page.values("href"):
            target, _, place = link.partition("#")
            assert not place or place in pages[target].values("id")


def test_the_page_across_sites_has_no_image(hostile: list[Inspection]) -> None:
    page = Page(render_index([site.facts for site in hostile], across(hostile), NOT_MEASURED))

    assert "img" not in page.tags()


def test_broken_files_are_listed_with_their_cure(hostile: list[Inspection]) -> None:
    north, south = (Page(render_site(site, across(hostile))).text for site in hostile)

    assert "This site cannot train" in north
    assert "copy or export the file again" in north
    assert "This site can train" in south
    assert "0.5 × 0.7" in south
    assert "Images that other sites also have" in north


def test_alerts_come_first_on_a_sites_page_and_on_the_index(raw: Path, add_image: Callable[..., None]) -> None:
    (found,) = inspect(raw, "north")
    found.facts["alerts"] = [f"12 files ({NAME}): its header has two spacings"]
    page, index = (
        Page(render_site(found, across([found]))),
        Page(render_index([found.facts], across([found]), NOT_MEASURED)),
    )

    assert f"12 files ({NAME}): its header has two spacings" in page.text
    assert f"12 files ({NAME}): its header has two spacings" in index.text
    assert "north.html#alerts" in index.values("href")
    assert "alerts" in page.values("id")


def test_a_site_without_readable_files_has_a_page(raw: Path) -> None:
    for path in (raw / "south" / "masks").iterdir():
        path.unlink()
    found = inspect(raw, "north", "south")

    page = Page(render_site(found[1], across(found)))
    index = Page(render_index([site.facts for site in found], across(found), NOT_MEASURED))

    assert "put the site's masks there" in page.text
    assert "img" not in page.tags()
    assert "1 of 2 sites cannot train" in index.text
    assert "St. Mary's" in index.text
    assert "Not measured." in index.text


def test_distances_are_a_symmetric_table_and_a_map(raw: Path) -> None:
    found = inspect(raw, "north", "south")
    rng = np.random.default_rng(0)
    features = {"north": rng.normal(size=(8, 5)), "south": rng.normal(3, 1, size=(8, 5))}
    pairs = site_distances(features, 0)
    points, explained = plane(features)

    page = Page(render_index([s.facts for s in found], across(found), Distances(pairs, points, explained, 8)))

    assert page.text.count(f"{pairs[0]['distance']:.1f}") >= 2
    assert len(page.values("srcset")) == 1


def test_a_sample_of_many_sites_is_called_one(raw: Path) -> None:
    found = inspect(raw, "north", "south")
    pairs = [{"sites": ["north", "south"], "distance": 1.0, "p": 0.5}]
    points = {site: np.zeros((2, 2)) for site in ("north", "south", "west")}

    page = Page(render_index([s.facts for s in found], across(found), Distances(pairs, points, 0.5, 8)))

    assert "Of 3 sites, 2 were drawn at random." in page.text


def test_the_same_data_give_the_same_page(raw: Path) -> None:
    (one,), (other,) = inspect(raw, "north"), inspect(raw, "north")

    assert render_site(one, across([one])) == render_site(other, across([other]))


def test_the_interactive_map_names_each_image() -> None:
    figure = interactive_map({"a": np.zeros((2, 2)), "b": np.ones((1, 2))}, {"a": ["x", "y"], "b": ["z"]})

    assert [(trace.name, list(trace.text)) for trace in figure.data] == [("a", ["x", "y"]), ("b", ["z"])]
    assert not interactive_map({}, {}).data


class TestThumbnails:
    @staticmethod
    def picture(side: int, classes: int) -> Picture:
        labels = np.zeros((side, side // 2), np.uint8)
        for label in range(1, classes + 1):
            labels[2 + 8 * label : 8 + 8 * label, 4:10] = label
        return Picture("x", None, "train", np.full((3, side, side // 2), 100, np.uint8), labels)

    def test_each_class_has_its_colour_and_the_rest_is_the_image(self) -> None:
        drawn = outlined(self.picture(200, 3))

        colours = {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
        expected = {tuple(bytes.fromhex(colour[1:])) for colour in CLASS_COLOURS[:3]}
        assert colours == expected | {(100, 100, 100), (0, 0, 0)}

    def test_without_a_class_no_outline_is_drawn(self) -> None:
        assert (outlined(self.picture(200, 0)) == 100).all()

    def test_a_small_image_is_shown_larger_pixel_by_pixel(self) -> None:
        assert outlined(self.picture(64, 0)).shape == (192, 96, 3)

    def test_the_data_address_contains_the_image(self) -> None:
        kind, data = data_uri(outlined(self.picture(200, 0))).split(",")

        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/jpeg;base64"
        assert image.size == (100, 200)

    @pytest.mark.parametrize(("count", "shape"), [(0, (192, 192, 3)), (1, (192, 192, 3)), (5, (576, 576, 3))])
    def test_a_sheet_has_every_picture(self, count: int, shape: tuple[int, ...]) -> None:
        assert sheet([self.picture(64, 1)] * count).shape == shape


def test_classes_are_listed_by_name(tmp_path: Path, add_image: Callable[..., None]) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[:10], mask[20:30] = 1, 2
    for number in range(6):
        add_image("clinic", f"{number}.png", number, mask)
    config = PreprocessingConfig(image_size=64, classes=2, class_names=("cup", "disc rim"))
    found = inspect_site(tmp_path / "raw", "clinic", config, 0, None, OPTIONS)

    text = Page(render_site(found, across([found]))).text

    assert "cup" in text
    assert "disc rim" in text


def test_the_index_fits_a_window_of_900_pixels(
    raw: Path, tmp_path: Path, write_volume_site: Callable[..., None]
) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs a chromium to lay the page out")
    hospital = "northern_university_hospital"
    write_volume_site(raw / hospital, affine=np.diag([0.8125, 0.8125, 2.5, 1.0]))
    found = inspect(raw, "north", "south", hospital)
    page = render_index([site.facts for site in found], across(found), NOT_MEASURED)
    # Without the policy against scripts: measure how far content exceeds the window and each table's frame.
    policy = page.index("<meta http-equiv")
    asked = (
        "<script>document.title = [document.documentElement, ...document.querySelectorAll('.wide')]"
        ".map(box => box.scrollWidth - box.clientWidth).join(' ')</script>"
    )
    page = page[:policy] + page[page.index(">", policy) + 1 :].replace("</body>", f"{asked}</body>")
    (tmp_path / "index.html").write_text(page, encoding="utf-8")

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    options = ["--headless", "--disable-gpu", *sandbox, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [browser, *options, "--window-size=900,1200", (tmp_path / "index.html").as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout

    beyond = dumped.split("<title>")[1].split("</title>")[0].split()
    assert len(beyond) >= 2
    assert set(beyond) == {"0"}
