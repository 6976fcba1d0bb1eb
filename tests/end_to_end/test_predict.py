"""``kedro run --pipeline=predict`` as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedsca_pipeline import load_site_model

SITE = "harbour_ct"


@pytest.fixture
def scans(finished, tmp_path: Path) -> Path:
    """New images of a site: a folder without masks."""
    shutil.copytree(finished.raw / SITE / "images", tmp_path / "scans" / "january")
    return tmp_path / "scans"


def test_a_folder_of_new_images_becomes_masks_overlays_and_a_table(used, scans: Path) -> None:
    (scans / "list.csv").write_text("name\n")

    done = used.run("predict", f"predict.model={SITE},predict.source={scans}")

    output = used.data / "07_model_output" / "predicted" / SITE
    assert done.code == 0, done.output
    assert f"Masks and predictions.csv: {output}" in done.words
    assert "passed over: 1 file of other formats" in done.words
    images = sorted((scans / "january").iterdir())
    assert f"{len(images)} images segmented, {len(images)} of them now" in done.words
    model = load_site_model(used.models / SITE, used.foundations)
    for path in images:
        mask = np.array(Image.open(output / "masks" / "january" / f"{path.stem}.png"))
        np.testing.assert_array_equal(mask, model.segment(path))
        assert (output / "overlays" / "january" / f"{path.stem}.png").is_file()
    table = pd.read_csv(output / "predictions.csv")
    assert table["image"].tolist() == [f"january/{path.stem}" for path in images]
    assert not (output / "unreadable.csv").exists()

    again = used.run("predict", f"predict.model={SITE},predict.source={scans}")

    assert again.code == 0, again.output
    assert f"{len(images)} images segmented, 0 of them now" in again.words


def test_what_cannot_be_read_is_listed_the_rest_is_done_and_the_command_fails(
    used, scans: Path, tmp_path: Path
) -> None:
    first, *others = sorted((scans / "january").iterdir())
    first.write_bytes(b"no image")

    done = used.run("predict", f"predict.model={used.models / SITE},predict.source={scans},predict.output={tmp_path}")

    assert done.code == 1
    assert "Traceback" not in done.output
    assert f"1 file could not be segmented, for example january/{first.stem}" in done.words
    listed = pd.read_csv(tmp_path / "unreadable.csv")
    assert listed["file"].tolist() == [f"january/{first.stem}"]
    assert len(list((tmp_path / "masks").rglob("*.png"))) == len(others)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("", "predict.model: not named; name a site (harbour_ct, meadow_mri, summit_ultrasound"),
        ("predict.model=harbor_ct", "'harbor_ct' is no site with a model, and no folder of one; did you mean"),
        (f"predict.model={SITE}", "predict.source: not named"),
        (f"predict.model={SITE},predict.source=/nowhere", "predict.source: there is no /nowhere"),
        (f"predict.model={SITE},predict.batch_size=0", "predict.batch_size: Input should be greater than or equal"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_line(used, params: str, said: str) -> None:
    done = used.run("predict", params)

    assert done.code == 1
    assert said in done.words
    assert "Traceback" not in done.output
    assert list((used.data / "07_model_output" / "predicted").rglob("*.*")) == []
