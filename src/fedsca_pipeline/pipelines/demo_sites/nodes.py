"""Node of the demonstration sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsca_pipeline.config import DemoSitesConfig


def write_demo_sites(raw_sites: Path, config: DemoSitesConfig) -> dict[str, Any]:
    """Write the demonstration sites if ``raw_sites`` holds none; say what is there afterwards."""
    from fedsca_pipeline.sites.demo import write_demo_sites

    return write_demo_sites(raw_sites, config)
