from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.pipelines.import_sites.nodes import build_sites, place_sites


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source" / "Kvasir-SEG"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / kind / "one.jpg")
    (folder / "images" / "two.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "masks" / "two.jpg")
    return folder.parent


def test_the_summary_can_be_saved_before_the_sites_are_there(tmp_path: Path, source: Path) -> None:
    raw = tmp_path / "raw"
    config = PreprocessingConfig(on_bad_sample="quarantine")

    summary = build_sites(raw, tmp_path / "private", "polyps", str(source), {}, hide_names=False, preprocessing=config)

    assert summary["Kvasir-SEG"]["broken"][0]["file"] == "Kvasir-SEG/images/two.jpg"
    # A command that is killed here has the list, and can be given again.
    assert not (raw / "Kvasir-SEG").exists()
    place_sites(raw, summary)
    assert (raw / "Kvasir-SEG" / "images" / "one.jpg").exists()


def test_without_built_sites_there_is_nothing_to_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no imported sites to move into place; run the whole pipeline import_sites"):
        place_sites(tmp_path, {})
