"""The demonstration sites are the same bytes every time, differ from each other, and prepare cleanly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from monai.transforms import GibbsNoise, RandBiasField, RandRicianNoise
from PIL import Image

from fedsca_pipeline.config import DemoSitesConfig, PreprocessingConfig
from fedsca_pipeline.data.demo import sites
from fedsca_pipeline.data.demo.sites import write_demo_sites
from fedsca_pipeline.data.preprocessing.prepare import prepare_site
from fedsca_pipeline.data.site_folder.discovery import (
    DEMO_SITES,
    SITES_READY,
    discover_sites,
    fingerprint_site,
    place_finished_sites,
)
from fedsca_pipeline.errors import DataError

IMAGE = np.random.default_rng(0).random((32, 32)).astype(np.float32)
CONFIG = DemoSitesConfig(images_per_site=10, image_size=64)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("demo") / "01_raw"
    write_demo_sites(raw, CONFIG)
    return raw


def load(raw: Path, site: str, kind: str) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((raw / site / kind).iterdir())]


def test_four_sites_are_written_and_described(tmp_path: Path) -> None:
    summary = write_demo_sites(tmp_path / "01_raw", DemoSitesConfig(images_per_site=4, image_size=32))

    assert tuple(summary) == DEMO_SITES == discover_sites(tmp_path / "01_raw")
    assert all(entry["images"] == 4 and entry["shift"] for entry in summary.values())
    assert {entry.name for entry in (tmp_path / "01_raw").iterdir()} == set(DEMO_SITES)


def test_the_same_configuration_gives_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    write_demo_sites(tmp_path, CONFIG)

    for site in DEMO_SITES:
        assert fingerprint_site(tmp_path, site) == fingerprint_site(demo, site)


def test_another_seed_gives_other_images(demo: Path, tmp_path: Path) -> None:
    write_demo_sites(tmp_path, CONFIG.model_copy(update={"seed": 1}))

    assert fingerprint_site(tmp_path, DEMO_SITES[0]) != fingerprint_site(demo, DEMO_SITES[0])


def test_where_there_is_a_site_nothing_is_touched(tmp_path: Path) -> None:
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "a.png").write_bytes(b"mine")

    summary = write_demo_sites(tmp_path, CONFIG)

    assert summary == {"mine": {"images": 1, "shift": "already there"}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_write_leaves_no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def full(path: Path, data: bytes) -> None:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    monkeypatch.setattr("fedsca_pipeline.data.demo.sites.write_bytes", full)

    with pytest.raises(OSError, match="No space left"):
        write_demo_sites(tmp_path, CONFIG)

    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_behind_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".demo_sites.partial" / DEMO_SITES[0] / "images").mkdir(parents=True)
    (tmp_path / ".demo_sites.partial" / DEMO_SITES[0] / "images" / "stale.png").touch()

    summary = write_demo_sites(tmp_path, DemoSitesConfig(images_per_site=4, image_size=32))

    assert {entry.name for entry in tmp_path.iterdir()} == set(DEMO_SITES)
    assert len(load(tmp_path, DEMO_SITES[0], "images")) == summary[DEMO_SITES[0]]["images"] == 4


def test_a_kill_between_the_moves_is_made_good_by_the_next_command(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    for site in DEMO_SITES[2:]:
        (tmp_path / SITES_READY).mkdir(exist_ok=True)
        (tmp_path / site).rename(tmp_path / SITES_READY / site)

    place_finished_sites(tmp_path)

    assert discover_sites(tmp_path) == DEMO_SITES
    assert not (tmp_path / SITES_READY).exists()


def test_masks_are_binary_mostly_filled_and_sometimes_empty(demo: Path) -> None:
    for site in DEMO_SITES:
        masks = load(demo, site, "masks")
        shares = [float((mask > 0).mean()) for mask in masks]

        assert set(np.unique(masks)) == {0, 255}
        assert shares.count(0.0) == 1
        assert 0.01 < np.mean(shares) < 0.25


def test_sites_differ_in_colour_contrast_and_field_of_view(demo: Path) -> None:
    images = {site: load(demo, site, "images") for site in DEMO_SITES}
    inside = {}
    for site in DEMO_SITES:
        grey = [image.mean(axis=-1) if image.ndim == 3 else image for image in images[site]]
        masks = [mask > 0 for mask in load(demo, site, "masks")]
        gaps = [g[m].mean() - g[~m & (g > 8)].mean() for g, m in zip(grey, masks, strict=True) if m.any()]
        inside[site] = np.mean(gaps)

    assert {image.ndim for image in images["valley_endoscopy"]} == {3}
    assert inside["meadow_mri"] < -10
    assert inside["harbour_ct"] > 10
    assert all(image[0, 0] == 0 for image in images["summit_ultrasound"])


@pytest.mark.parametrize("site", DEMO_SITES)
def test_each_site_prepares_without_a_broken_file_and_by_patient(demo: Path, site: str) -> None:
    prepared = prepare_site(demo, site, PreprocessingConfig(image_size=64), seed=0)

    assert prepared.report["broken"] == []
    assert prepared.report["counts"]["subjects"] < prepared.report["counts"]["used"] == 10
    assert prepared.report["empty_masks"] == 1


@pytest.mark.parametrize("images", [4, 5, 6, 7])
def test_few_images_still_fill_three_splits(tmp_path: Path, images: int) -> None:
    write_demo_sites(tmp_path, DemoSitesConfig(images_per_site=images, image_size=32))

    for site in DEMO_SITES:
        counts = prepare_site(tmp_path, site, PreprocessingConfig(image_size=32), seed=0).report["counts"]
        assert min(counts["train"], counts["validation"], counts["test"]) >= 1


def test_folders_that_are_no_sites_are_named_instead_of_adding_phantoms(tmp_path: Path) -> None:
    (tmp_path / "hospital" / "imgs").mkdir(parents=True)

    with pytest.raises(DataError, match=r"no site in hospital; a site is a folder with images/ and masks/"):
        write_demo_sites(tmp_path, DemoSitesConfig())

    assert [path.name for path in tmp_path.iterdir()] == ["hospital"]


def test_the_faults_of_the_scanners_are_those_of_monai() -> None:
    bias = RandBiasField(prob=1.0, degree=3, coeff_range=(-0.2, 0.2)).set_random_state(5)
    rician = RandRicianNoise(prob=1.0, std=0.1, sample_std=False).set_random_state(5)

    biased = (IMAGE * sites._bias_field(IMAGE.shape, 5, degree=3, strength=0.2)).astype(np.float32)

    np.testing.assert_array_equal(biased, bias(IMAGE[None])[0])
    np.testing.assert_allclose(
        sites._without_high_frequencies(IMAGE, 0.35), GibbsNoise(alpha=0.35)(IMAGE[None])[0], atol=1e-6
    )
    np.testing.assert_array_equal(sites._rician(IMAGE, 5, 0.1), rician(IMAGE[None])[0])
