"""Nodes of the comparison: plan the grid, run its cells, write the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import ComparisonConfig, Settings
from fedsca_pipeline.federation.run import data_version


def plan_comparison(
    settings: Settings, comparison: ComparisonConfig, foundation_provenance: dict[str, Any], *reports: Any
) -> dict[str, Any]:
    """Return the checked setting of all cells as JSON values."""
    from fedsca_pipeline.comparison.plan import make_plan

    data = {report["site"]: data_version(report["fingerprint"], report) for report in reports}
    return make_plan(settings, comparison, data, foundation_provenance["sha256"])


def run_cells(
    plan: dict[str, Any], force: bool, foundations: Path, scratch: Path, finished: Path, *site_inputs: Any
) -> Iterator[dict[str, Any]]:
    """Run the cells that have no result, and yield each result by its fingerprint when its cell ends.

    ``force`` runs all cells again, from their first round. ``site_inputs`` alternate manifest and arrays, one pair per
    site.
    """
    from fedsca_pipeline.comparison.grid import Grid, Source, run_comparison
    from fedsca_pipeline.comparison.plan import setting_of
    from fedsca_pipeline.comparison.results import code_at_work
    from fedsca_pipeline.pipelines.progress.grid import GridProgress

    setting = setting_of(plan)
    pairs = zip(site_inputs[::2], site_inputs[1::2], strict=True)
    sites = {str(manifest["site"].iloc[0]): (path, manifest) for manifest, path in pairs}
    source = Source(sites, foundations, scratch, code_at_work())
    with Grid(source, setting.config, None if force else finished, GridProgress) as grid:
        yield from run_comparison(plan, grid)


def report_comparison(
    plan: dict[str, Any], finished: Path, _: Any
) -> tuple[dict[str, str], Any, Any, Any, str, str, dict[str, Any]]:
    """Return the cells' names by fingerprint, then table, tests, unseen sites, the page, the HTML page and figures."""
    from fedsca_pipeline.comparison.report import report_of

    index, report = report_of(plan, finished)
    return index, report.table, report.tests, report.unseen, report.page, report.html, report.figures
