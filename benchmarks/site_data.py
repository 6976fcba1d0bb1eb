"""Sites to measure on, made on the spot: phantoms of the demonstration hospitals, prepared as a run prepares them."""

from __future__ import annotations

from pathlib import Path

from fedsca_pipeline.config import DemoSitesConfig, PreprocessingConfig, SplitConfig
from fedsca_pipeline.sites.arrays import SiteArrays, manifest_digest, write_arrays
from fedsca_pipeline.sites.demo import write_demo_sites
from fedsca_pipeline.sites.prepare import prepare_site


def demonstration_sites(folder: Path, *, images: int, validation: int, side: int) -> dict[str, SiteArrays]:
    """Write the demonstration sites below ``folder`` and return them by name.

    Each has ``images`` training images of side x side pixels, and so many of the others count as validation (0: none).
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


def _prepared(folder: Path, raw: Path, site: str, config: PreprocessingConfig, validation: int) -> SiteArrays:
    prepared = prepare_site(raw, site, config, seed=0)
    manifest = prepared.manifest
    if not validation:
        manifest = manifest.replace({"split": {"validation": "unused"}})
    path = folder / f"{site}.safetensors"
    write_arrays(path, {**prepared.arrays, "manifest": manifest_digest(manifest)})
    return SiteArrays(path, manifest)
