"""Nodes of preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import PreprocessingConfig, RunConfig


def prepare_for(site: str) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Return the node function that prepares one site."""

    def prepare(
        raw_sites: Path,
        model_input: Path,
        _demo_sites_summary: dict[str, Any],
        previous_manifest: Any,
        preprocessing: PreprocessingConfig,
        run: RunConfig,
    ) -> tuple[Any, Any, dict[str, Any]]:
        from fedsca_pipeline.data.preprocessing.prepare import prepare_site

        prepared = prepare_site(raw_sites, site, preprocessing, run.seed, previous_manifest, scratch=model_input)
        return prepared.manifest, prepared.arrays, prepared.report

    return prepare
