"""The work folder of a site: paths of everything that the site writes, in the layout of ``data/``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.files import from_cells
from fedsca_pipeline.flower.config import SiteConfig


@dataclass(frozen=True)
class WorkFolder:
    """Paths below the work folder of a site.

    ``raw``, ``private``, ``models``, ``checkpoints``, ``predictions`` (of test images) and ``predicted`` (of new ones)
    are folders, the others are files.
    """

    site: str
    raw: Path
    private: Path
    terms: Path
    prepared: Path
    report: Path
    manifest: Path
    arrays: Path
    models: Path
    checkpoints: Path
    scores: Path
    volume_scores: Path
    predictions: Path
    predicted: Path
    overlays: Path

    @classmethod
    def of(cls, config: SiteConfig) -> WorkFolder:
        """Return the paths for a site."""
        root = config.work
        return cls(
            site=config.site,
            raw=root / "01_raw",
            private=root / "private",
            terms=root / "02_intermediate" / "terms.json",
            prepared=root / "02_intermediate" / "prepared.json",
            report=root / "02_intermediate" / "report.json",
            manifest=root / "03_primary" / "manifest.csv",
            arrays=root / "05_model_input" / "arrays.safetensors",
            models=root / "06_models",
            checkpoints=root / "07_model_output" / "checkpoints",
            scores=root / "07_model_output" / "test_scores.csv",
            volume_scores=root / "07_model_output" / "volume_scores.csv",
            predictions=root / "07_model_output" / "predictions",
            predicted=root / "07_model_output" / "predicted",
            overlays=root / "08_reporting" / "overlays.png",
        )

    def load_manifest(self) -> pd.DataFrame | None:
        """Return the manifest, or None if the data have not been prepared."""
        if not self.manifest.is_file():
            return None
        return from_cells(pd.read_csv(self.manifest, dtype=dict(MANIFEST_DTYPES), keep_default_na=False))

    def link_raw(self, data: Path) -> None:
        """Link the data folder into ``raw`` under the name of the site."""
        link = self.raw / self.site
        self.raw.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.readlink() != data:
            link.unlink()
        if not link.is_symlink():
            link.symlink_to(data)
