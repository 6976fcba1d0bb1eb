"""The pretrained foundation, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline import load_site_model

NUCLEI = ("fluo_360", "tissue_violet_320", "tissue_white_320")


@pytest.fixture
def place(workplace, foundation_root: Path):
    """A workplace beside fetched foundation weights."""
    shutil.copytree(foundation_root, workplace.foundations)
    return workplace


def test_mobile_sam_is_tuned_on_the_demonstration_sites(place) -> None:
    params = (
        "foundation.name=mobile_sam,demo_sites.images_per_site=6,preprocessing.image_size=64,"
        "federation.rounds=1,adapters.width=8,run.threads=2"
    )

    done = place.run("federated_training", params)

    table = json.loads((place.reporting / "final_table.json").read_text())
    image = next((place.raw / "meadow_mri" / "images").iterdir())
    with Image.open(image) as opened:
        pixels = np.array(opened)
    mask = load_site_model(place.models / "meadow_mri").segment(pixels)
    assert done.code == 0, done.output
    assert len(table) == 5
    assert mask.shape == pixels.shape[:2]
    assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.real_data
def test_three_rounds_on_nuclei_beat_the_foundation_at_every_site(place, nuclei_root: Path) -> None:
    for site in NUCLEI:
        (place.raw / site).mkdir(parents=True)
        for kind in ("images", "masks"):
            (place.raw / site / kind).mkdir()
            for path in sorted((nuclei_root / site / kind).iterdir())[:30]:
                shutil.copy(path, place.raw / site / kind)
    params = (
        "federation.rounds=3,preprocessing.image_size=128,preprocessing.split.validation=4,preprocessing.split.test=8,"
        "preprocessing.split.max_train=12,run.threads=2"
    )

    done = place.run("federated_training", params, env="nuclei")

    table = json.loads((place.reporting / "final_table.json").read_text())
    assert done.code == 0, done.output
    assert all(table[site]["Dice chosen"] > table[site]["Dice before"] for site in NUCLEI)
    assert table["mean over sites"]["Dice chosen"] > table["mean over sites"]["Dice before"] + 0.05
