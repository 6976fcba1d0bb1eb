from __future__ import annotations

import logging
from pathlib import Path

import pytest

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.pipelines.demo_sites.nodes import write_demo_sites

SMALL = DemoSitesConfig(images_per_site=4, image_size=32)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (DemoSitesConfig(), "4 images of 32 px, not 40 of 256 px; delete the folders harbour_ct, meadow_mri"),
        (DemoSitesConfig(images_per_site=5, image_size=32), "4 images of 32 px, not 5 of 32 px"),
        (SMALL, None),
    ],
)
def test_demonstration_data_of_another_size_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, wanted: DemoSitesConfig, said: str | None
) -> None:
    write_demo_sites(tmp_path, SMALL)
    assert "other settings" not in caplog.text

    with caplog.at_level(logging.WARNING, "fedsca_pipeline"):
        write_demo_sites(tmp_path, wanted)

    assert "are used" in caplog.text
    assert (said in caplog.text) if said else ("other settings" not in caplog.text)


def test_a_broken_demonstration_image_is_left_to_preprocessing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_demo_sites(tmp_path, SMALL)
    for image in tmp_path.glob("*/images/p000_1.png"):
        image.write_bytes(b"")

    write_demo_sites(tmp_path, SMALL)

    assert "other settings" not in caplog.text
