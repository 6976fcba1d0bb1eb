"""The whole import, as the pipeline does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsca_pipeline.data.importers.layout import Importer
from fedsca_pipeline.data.importers.write import build_sites, place_built_sites


def import_sites(raw: Path, importer: Importer, source: Path, **more: Any) -> dict[str, dict[str, Any]]:
    """Build the sites and move them to ``raw``; return the summary."""
    summary = build_sites(raw, importer, source, **more)
    place_built_sites(raw)
    return summary
