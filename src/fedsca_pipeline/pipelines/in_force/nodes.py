"""Node of the parameters in force."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import DataReportConfig, DemoSitesConfig, Settings
from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES, discover_sites
from fedsca_pipeline.errors import DataError


def write_in_force(
    settings: Settings,
    demo_sites: DemoSitesConfig,
    data_report: DataReportConfig,
    raw_sites: Path,
    dvc_stages: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the parameters that decide what the stages of ``dvc.yaml`` make, merged from all files and options.

    Raises:
        DataError: ``dvc.yaml`` has other sites than the raw folder.
    """
    (named,) = [entry["sites"] for entry in dvc_stages["vars"] if "sites" in entry]
    there = discover_sites(raw_sites) or DEMO_SITES
    faults = [f"add {site}" for site in there if site not in named]
    faults += [f"take out {site}" for site in named if site not in there]
    if faults:
        raise DataError(
            f"dvc.yaml: vars: sites are not the folders in {raw_sites}: {', '.join(faults)} (kedro run needs no list)"
        )
    groups = {"demo_sites": demo_sites, "data_report": data_report}
    return {
        **settings.model_dump(mode="json"),
        **{name: group.model_dump(mode="json") for name, group in groups.items()},
    }
