"""Node of the deletion of a site."""

from __future__ import annotations

from pathlib import Path

from fedsca_pipeline.data.site_folder.discovery import SITE_NAME, discover_sites
from fedsca_pipeline.errors import ConfigError, suggestion
from fedsca_pipeline.forget import RAW, forget, kept_sites
from fedsca_pipeline.terminal import show_forgotten
from fedsca_pipeline.tracking.forget import ForgettingWriter


def forget_site(
    site: str | None, delete_raw: bool, data_root: Path, comparison_folder: Path, forgetting: ForgettingWriter
) -> list[str]:
    """Delete all that is kept of a site, print it and what is out of reach, and return the deleted paths.

    MLflow comes first: as long as it cannot be reached, nothing is deleted.

    Raises:
        ConfigError: no site is named, or nothing is kept of it.
        TrackingError: MLflow cannot be reached or written to.
    """
    known = sorted(kept_sites(data_root).union(discover_sites(data_root / "01_raw")))
    if site is None:
        raise ConfigError(f"site: not named; --params=site=<name> with one of {', '.join(known) or 'none'}")
    if site not in known and not (SITE_NAME.fullmatch(site) and forgetting.runs_of(site)):
        raise ConfigError(f"site: nothing is kept of {site!r} in {data_root} or MLflow{suggestion(site, known)}")
    runs = forgetting.forget(site)
    deleted = [str(path) for path in forget(data_root, site, comparison_folder, raw=delete_raw)]
    raw = [str(path) for pattern in RAW for path in data_root.glob(pattern.format(site=site))]
    show_forgotten(site, deleted, runs, raw, forgetting.out_of_reach())
    return deleted
