"""Sites to measure on, prepared as a run prepares them: generated phantoms, and the nuclei sites."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from safetensors.numpy import save_file

from fedsca_pipeline.config import DemoSitesConfig, PreprocessingConfig, SplitConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.demo.sites import write_demo_sites
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES, manifest_digest
from fedsca_pipeline.data.preprocessing.prepare import prepare_site

PROJECT = Path(__file__).resolve().parents[1]


def demonstration_sites(folder: Path, *, images: int, validation: int, side: int) -> dict[str, SiteArrays]:
    """Return the sites of :func:`demonstration_files`, opened."""
    files = demonstration_files(folder, images=images, validation=validation, side=side)
    return {site: SiteArrays(*file) for site, file in files.items()}


def demonstration_files(
    folder: Path, *, images: int, validation: int, side: int
) -> dict[str, tuple[Path, pd.DataFrame]]:
    """Write the demonstration sites below ``folder`` and return path of arrays and manifest by site.

    Each has ``images`` training images of side x side pixels, and ``validation`` validation images (0: none).
    """
    held_out = max(validation, 1)
    raw = folder / "raw"
    write_demo_sites(raw, DemoSitesConfig(images_per_site=images + held_out + 1, image_size=side))
    split = SplitConfig(validation=held_out, test=1, max_train=images)
    config = PreprocessingConfig(image_size=side, split=split)
    return {site.name: _prepared(folder, raw, site.name, config, validation) for site in sorted(raw.iterdir())}


def demonstration_site(folder: Path, *, images: int, validation: int, side: int) -> SiteArrays:
    """Return the first of :func:`demonstration_sites`."""
    return next(iter(demonstration_sites(folder, images=images, validation=validation, side=side).values()))


def nuclei_sites(data: Path, sites: Sequence[str], root: Path, *, images: int) -> dict[str, tuple[Path, pd.DataFrame]]:
    """Preprocess nuclei sites (docs/nuclei.md) below ``root`` by the real command; return path of arrays and manifest.

    Each has at most ``images`` training images.
    """
    (root / "01_raw").mkdir()
    for site in sites:
        (root / "01_raw" / site).symlink_to(data.resolve() / site)
    command = [sys.executable, "-m", "kedro", "run", "--pipeline=preprocessing", "--env=nuclei"]
    command += [f"--params=data_root={root},preprocessing.split.max_train={images}"]
    subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    return {
        site: (
            root / "05_model_input" / f"{site}.safetensors",
            pd.read_csv(root / "03_primary" / site / "manifest.csv", dtype=dict(MANIFEST_DTYPES)),
        )
        for site in sites
    }


def _prepared(
    folder: Path, raw: Path, site: str, config: PreprocessingConfig, validation: int
) -> tuple[Path, pd.DataFrame]:
    prepared = prepare_site(raw, site, config, seed=0)
    manifest = prepared.manifest
    if not validation:
        manifest = manifest.replace({"split": {"validation": "unused"}})
    path = folder / f"{site}.safetensors"
    save_file({**prepared.arrays, "manifest": manifest_digest(manifest)}, path)
    return path, manifest
