"""The data report says how far it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.config import DataReportConfig, PreprocessingConfig, RunConfig
from fedsca_pipeline.pipelines.data_report.nodes import InspectedSite


@pytest.mark.parametrize(("count", "lines"), [(3, 3), (25, 10)])
def test_without_a_terminal_each_tenth_of_the_images_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, lines: int
) -> None:
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "north" / kind).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 2 if kind == "masks" else 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "north" / kind / f"{number:02d}.png")

    options = DataReportConfig(thumbnails=0, embedding=False)
    InspectedSite("north").inspect(tmp_path, {}, None, PreprocessingConfig(image_size=16), RunConfig(), options)

    logged = [message for message in caplog.messages if message.endswith("read")]
    assert len(logged) == lines
    assert logged[-1] == f"north: {count} of {count} images read"
