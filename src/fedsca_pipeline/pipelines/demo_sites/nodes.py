"""Node of the demonstration sites."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import DemoSitesConfig

logger = logging.getLogger(__name__)


def write_demo_sites(raw_sites: Path, config: DemoSitesConfig) -> dict[str, Any]:
    """Write the demonstration sites if ``raw_sites`` holds no site; return a summary of what is there.

    Warns if demonstration sites are there, and if their images are not as ``config`` has them.
    """
    from fedsca_pipeline.data.demo.sites import unlike, write_demo_sites
    from fedsca_pipeline.data.site_folder.discovery import demonstration_sites, discover_sites

    made = not discover_sites(raw_sites)
    summary = write_demo_sites(raw_sites, config)
    if demonstration := demonstration_sites(raw_sites):
        logger.warning(
            "demonstration data, phantoms and no patients: %s in %s %s; to train on your own data, delete them and put "
            "site folders there, or import a data set (README.md)",
            ", ".join(demonstration),
            raw_sites,
            "were created" if made else "are used",
        )
        if difference := unlike(raw_sites, config):
            logger.warning(
                "the demonstration data are of other settings than demo_sites has now: %s; delete the folders %s in %s "
                "to have them made anew",
                difference,
                ", ".join(demonstration),
                raw_sites,
            )
    return summary
