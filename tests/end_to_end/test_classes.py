"""Several classes through the command line: three sites, one without a class, masks in three ways."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Run
from PIL import Image

from fedsca_pipeline import load_site_model
from fedsca_pipeline.files import read_json

NAMES = ("tumour", "cyst", "vessel")
SITES = {"grey": (1, 2, 3), "palette": (1, 2, 3), "rgb": (1, 3)}
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 128, 255))
MAP = "label_map: {'#ff0000': 1, '#00FF00': 2, '#0080ff': 3}\n"
MEAN, ALL = "mean over sites", "mean over classes"
PARAMETERS = """
run: {threads: 1}
preprocessing: {image_size: 32, classes: 3, class_names: [tumour, cyst, vessel]}
foundation: {name: random, head: softmax}
adapters: {width: 4}
federation: {rounds: 2}
"""


def write_site(folder: Path, site: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for number in range(10):
        image = draw.normal(60, 10, (40, 48, 3))
        mask = np.zeros((40, 48), np.uint8)
        for place, label in enumerate(SITES[site]):
            top, left = draw.integers(0, 24), 16 * place + draw.integers(0, 4)
            mask[top : top + 12, left : left + 10] = label
        image[mask > 0] += np.array(COLOURS)[mask[mask > 0]] / 2
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"i{number}.png")
        painted(mask, site).save(folder / "masks" / f"i{number}.{'tif' if site == 'rgb' else 'png'}")
    if site != "grey":
        (folder / "site.yml").write_text(MAP)


def painted(mask: np.ndarray, site: str) -> Image.Image:
    if site == "rgb":
        return Image.fromarray(np.array(COLOURS, np.uint8)[mask])
    image = Image.fromarray(mask)
    if site == "palette":
        # In another order, so that indices would give other classes than colours do.
        image = Image.fromarray(np.array([0, 3, 1, 2], np.uint8)[mask]).convert("P")
        image.putpalette([channel for label in (0, 2, 3, 1) for channel in COLOURS[label]])
    return image


@pytest.fixture(scope="module")
def place(new_workplace, project: Path):
    """A workplace after a run of three classes; what it printed is in ``printed.txt``."""
    made = new_workplace()
    made = replace(made, conf=Path(shutil.copytree(project / "conf", made.root / "conf")))
    (made.conf / "smoke" / "parameters.yml").write_text(PARAMETERS)
    for seed, site in enumerate(SITES):
        write_site(made.raw / site, site, seed)
    done = made.run()
    assert done.code == 0, done.output
    (made.root / "printed.txt").write_text(done.stdout)
    return made


def site_scores(place) -> pd.DataFrame:
    return pd.read_csv(place.reporting / "site_scores.csv", keep_default_na=False)


def metrics(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.data.metrics.items() if name.startswith("test Dice chosen ")}


def test_masks_in_grey_palette_and_rgb_come_to_the_same_classes_and_the_manifest_says_how(place) -> None:
    manifests = {site: pd.read_csv(place.manifest(site)) for site in SITES}

    assert {site: set(table["classes"]) for site, table in manifests.items()} == {
        "grey": {"[1, 2, 3]"}, "palette": {"[1, 2, 3]"}, "rgb": {"[1, 3]"},
    }  # fmt: skip
    applied = {"#ff0000": 1, "#00ff00": 2, "#0080ff": 3}
    assert all(json.loads(cell) == applied for site in ("palette", "rgb") for cell in manifests[site]["label_map"])
    assert read_json(place.report("rgb"))["warnings"] == ["cyst: in no mask, so it is neither trained nor scored here"]
    shares = {site: read_json(place.report(site))["class_shares"] for site in SITES}
    assert all(share == pytest.approx(1 / 16, rel=0.3) for share in list(shares["palette"].values())[1:])


def test_tables_have_each_class_where_a_site_has_it_and_no_value_is_missing(place) -> None:
    table = site_scores(place)

    assert set(table["class"]) == {ALL, *NAMES}
    numbers = table.drop(columns=["site", "model", "class", "note"]).astype(float)
    assert np.isfinite(numbers.to_numpy()).all()
    of_rgb = table[(table["site"] == "rgb") & (table["model"] == "chosen")].set_index("class")
    assert set(of_rgb.index) == {ALL, "tumour", "vessel"}
    assert float(of_rgb.loc[ALL, "dice"]) == pytest.approx(
        of_rgb.loc[["tumour", "vessel"], "dice"].astype(float).mean()
    )
    assert of_rgb.loc[ALL, "note"] == "without cyst"
    cyst = table[(table["class"] == "cyst") & (table["model"] == "chosen")].set_index("site")
    assert float(cyst.loc[MEAN, "dice"]) == pytest.approx(cyst.loc[["grey", "palette"], "dice"].astype(float).mean())
    assert cyst.loc[MEAN, "note"] == "unweighted, over 2 of 3 sites: not at rgb"
    scores = pd.read_csv(place.test_scores("rgb"), keep_default_na=False)
    assert set(scores["class"]) == {1, 3}
    assert "nan" not in (place.reporting / "image_scores.csv").read_text().lower()


def test_the_final_table_and_the_terminal_show_the_classes(place) -> None:
    final = read_json(place.reporting / "final_table.json")

    assert final["rgb"]["Dice chosen cyst"] is None
    assert all(isinstance(final[MEAN][f"Dice chosen {name}"], float) for name in NAMES)
    words = " ".join((place.root / "printed.txt").read_text().split())
    assert "Dice of the chosen models per class" in words
    assert "cyst 2 of 3" in words


def test_mlflow_has_the_dice_of_each_class_at_each_site_that_has_it(place) -> None:
    (parent,) = place.parents()
    final = read_json(place.reporting / "final_table.json")

    for site, run in place.nested(parent).items():
        assert metrics(run) == {
            f"test Dice chosen {name}": pytest.approx(final[site][f"Dice chosen {name}"])
            for name in NAMES
            if final[site][f"Dice chosen {name}"] is not None
        }
    assert set(metrics(parent)) == {f"test Dice chosen {name} {MEAN}" for name in NAMES} | {f"test Dice chosen {MEAN}"}


def test_the_model_of_a_site_never_draws_the_class_that_the_site_lacks(place) -> None:
    models = {site: load_site_model(place.models / site, place.foundations) for site in SITES}
    picture = np.asarray(Image.open(place.raw / "rgb" / "images" / "i0.png"))

    assert (models["rgb"].card.known_classes, models["grey"].card.known_classes) == ((1, 3), (1, 2, 3))
    assert models["rgb"].card.class_names == NAMES
    assert 2 not in models["rgb"].segment(picture)


def test_an_unknown_colour_is_named_with_file_and_cure(place, tmp_path: Path) -> None:
    used = place.moved(tmp_path / "used")
    path = used.raw / "rgb" / "masks" / "i4.tif"
    pixels = np.array(Image.open(path))
    pixels[0, 0] = 255, 128, 0
    Image.fromarray(pixels).save(path)

    done = used.run("preprocessing")

    assert done.code == 1
    assert "rgb/masks/i4.tif: unknown label colour #ff8000 (classes are 0..3); name it under label_map" in done.words
    assert "Traceback" not in done.output
