"""Nodes of the data report."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import DataReportConfig, FoundationConfig, PreprocessingConfig, RunConfig
from fedsca_pipeline.errors import WeightsError, counted

if TYPE_CHECKING:
    import numpy as np
    from rich.progress import Progress

    from fedsca_pipeline.data_report.inspection import Inspection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InspectedSite:
    """The node of one site. Its bound method can be pickled, for a runner with processes, and has types for Kedro."""

    site: str

    def inspect(
        self,
        raw_sites: Path,
        _demo_sites_summary: dict[str, Any],
        previous_manifest: Any,
        preprocessing: PreprocessingConfig,
        run: RunConfig,
        data_report: DataReportConfig,
    ) -> tuple[Any, dict[str, Any], Any]:
        """Return the site's inspection, its facts and its contact sheet."""
        from fedsca_pipeline.data_report.figures import sheet_figure
        from fedsca_pipeline.data_report.inspection import inspect_site
        from fedsca_pipeline.data_report.thumbnails import sheet

        with _progress() as bars:
            bar, shown = bars.add_task(self.site), 0

            def show(done: int, of: int) -> None:
                """Move the bar; without a terminal, log each tenth of the images."""
                nonlocal shown
                bars.update(bar, completed=done, total=of)
                if bars.disable and of and (tenth := 10 * done // of) > shown:
                    shown = tenth
                    logger.info("%s: %d of %s read", self.site, done, counted(of, "image"))

            found = inspect_site(
                raw_sites,
                self.site,
                preprocessing,
                run.seed,
                previous_manifest,
                data_report,
                show,
            )
        return found, found.facts, sheet_figure(sheet(found.pictures))


def compare(
    raw_sites: Path,
    foundations: Path,
    run: RunConfig,
    foundation: FoundationConfig,
    data_report: DataReportConfig,
    *inspections: Any,
) -> tuple[Any, ...]:
    """Return the page across sites, its JSON, table and map, then one page per site."""
    from fedsca_pipeline.data_report.across import across_sites, overview
    from fedsca_pipeline.data_report.distance import plane, site_distances
    from fedsca_pipeline.data_report.figures import interactive_map
    from fedsca_pipeline.data_report.page import Distances, render_index, render_site

    facts = [found.facts for found in inspections]
    features, missing = _features(foundations, run, foundation, data_report, inspections)
    pairs = site_distances(features, run.seed)
    points, explained = plane(features)
    names = {found.facts["site"]: found.embedded.names for found in inspections}
    across = {
        **across_sites(facts, data_report.near_duplicate_bits, _passed_over(raw_sites, facts)),
        "distances": pairs,
    }
    distances = Distances(pairs, points, explained, data_report.embedded_images, missing)
    return (
        render_index(facts, across, distances),
        across,
        overview(facts),
        interactive_map(points, names),
        *(render_site(found, across) for found in inspections),
    )


def _features(
    foundations: Path, run: RunConfig, foundation: FoundationConfig, options: DataReportConfig, inspections: Any
) -> tuple[dict[str, np.ndarray], str]:
    """Return the foundation's features of the images by site, and the reason if there are too few to compare."""
    if not options.embedding:
        return {}, "Not measured: data_report.embedding is false."
    if sum(len(found.embedded.images) > 0 for found in inspections) < 2:
        return {}, "Not measured: fewer than two sites have usable images."
    from fedsca_pipeline.model.foundation import prepare_foundation

    try:
        prepare_foundation(foundation, foundations)
        return _embed(foundations, run, foundation, inspections), "Fewer than two sites have four usable images."
    except WeightsError as error:
        logger.warning("no distance between sites: %s", error)
        return {}, f"Not measured, because the foundation is not available: {error}"


def _embed(foundations: Path, run: RunConfig, foundation: FoundationConfig, inspections: Any) -> dict[str, np.ndarray]:
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.data_report.embedding import embed_images
    from fedsca_pipeline.federation.run import resolve_threads
    from fedsca_pipeline.model.foundation import load_foundation

    usable: list[Inspection] = [found for found in inspections if len(found.embedded.images)]
    size = usable[0].embedded.images.shape[-1]
    features = {}
    with deterministic(run, resolve_threads(run.threads)) as device, _progress() as bars:
        model = load_foundation(foundation, foundations, image_size=size, classes=1).to(device)
        bar = bars.add_task("embedding", total=sum(len(found.embedded.images) for found in usable))
        for found in usable:
            images, valid = found.embedded.images, found.embedded.valid
            features[found.facts["site"]] = embed_images(model, images, valid, device, lambda n: bars.advance(bar, n))
    return features


def _progress() -> Progress:
    """Return progress bars, which are disabled if the output is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _passed_over(raw_sites: Path, facts: list[dict[str, Any]]) -> list[str]:
    sites = {site["site"] for site in facts}
    folders = (entry.name for entry in raw_sites.iterdir() if entry.is_dir())
    return sorted(name for name in folders if name not in sites and not name.startswith((".", "_")))
