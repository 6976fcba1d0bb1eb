"""Fixtures that more than one test folder needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

# A loaded machine is not a failing law.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the Kedro project."""
    return PROJECT


@pytest.fixture(scope="session")
def foundation_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the real mobile_sam has been fetched, verified and converted once."""
    from fedsca_pipeline.config import FoundationConfig
    from fedsca_pipeline.foundation import prepare_foundation

    root = tmp_path_factory.mktemp("foundations")
    prepare_foundation(FoundationConfig(), root)
    return root


@pytest.fixture(scope="session")
def nuclei_root() -> Path:
    """The nuclei sites of docs/nuclei.md."""
    root = Path(os.environ.get("FEDSCA_NUCLEI", PROJECT.parent / "shared" / "data" / "nuclei"))
    if not root.is_dir():
        pytest.skip("the nuclei sites are not here; set FEDSCA_NUCLEI to their folder (docs/nuclei.md)")
    return root


@pytest.fixture(scope="session")
def write_volume_site() -> Callable[..., None]:
    """Writes a site of phantom volumes [size, size, slices] as ``.nii.gz``: lesions in the middle, none at the ends."""
    import nibabel
    from scipy import ndimage

    from fedsca_pipeline.sites.phantoms import make_phantom

    def phantom(size: int, slices: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        sick, healthy = (
            make_phantom(
                size, np.random.default_rng(seed), np.random.default_rng(seed + 1), lesions=count, radius=(0.2, 0.3)
            )
            for count in (2, 0)
        )
        depth = ndimage.distance_transform_edt(sick.lesions)[..., None]
        away = np.abs(np.arange(slices) - (slices - 1) / 2)
        lesions = depth > 1.5 * away
        tissue = np.where(lesions, sick.tissue[..., None], healthy.tissue[..., None])
        # Rows and columns of a picture run to the back and to the left; a grid of RAS+ runs the other way.
        ras = [np.swapaxes(field, 0, 1)[::-1, ::-1] for field in (tissue, lesions)]
        return np.rint(1000 * ras[0] - 500).astype(np.int16), ras[1].astype(np.uint8)

    def write(
        folder: Path,
        *,
        count: int = 5,
        size: int = 32,
        slices: int = 7,
        seed: int = 0,
        affine: np.ndarray | None = None,
    ) -> None:
        affine = np.diag([0.8, 0.8, 2.5, 1.0]) if affine is None else affine
        for number in range(count):
            image, mask = phantom(size, slices, 100 * seed + 10 * number)
            for kind, voxels in (("images", image), ("masks", mask)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                # The grid may run in any direction; what is at which place does not change.
                there = nibabel.Nifti1Image(voxels, np.diag([0.8, 0.8, 2.5, 1.0]))
                axes = nibabel.orientations.ornt_transform(
                    nibabel.io_orientation(there.affine), nibabel.io_orientation(affine)
                )
                turned = there.as_reoriented(axes)
                nibabel.save(
                    nibabel.Nifti1Image(np.asanyarray(turned.dataobj), affine), folder / kind / f"v{number}.nii.gz"
                )

    return write
