"""Nodes of preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import PreprocessingConfig, RunConfig


@dataclass(frozen=True)
class PreparedSite:
    """The node of one site. Its bound method can be pickled, for a runner with processes, and has types for Kedro."""

    site: str

    def prepare(
        self,
        raw_sites: Path,
        model_input: Path,
        _demo_sites_summary: dict[str, Any],
        previous_manifest: Any,
        preprocessing: PreprocessingConfig,
        run: RunConfig,
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Return the site's manifest, arrays and report."""
        from fedsca_pipeline.data.preprocessing.prepare import prepare_site

        prepared = prepare_site(raw_sites, self.site, preprocessing, run.seed, previous_manifest, scratch=model_input)
        return prepared.manifest, prepared.arrays, prepared.report
