"""Nodes of the comparison: plan the grid, run its cells, write the report."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import ComparisonConfig, Settings
from fedsca_pipeline.errors import ConfigError, counted
from fedsca_pipeline.federation.fleets.registry import available_cores
from fedsca_pipeline.federation.run import data_version

if TYPE_CHECKING:
    from fedsca_pipeline.comparison.grid import Source
    from fedsca_pipeline.comparison.plan import Cell
    from fedsca_pipeline.federation.fleets.worker_pool import WorkerPool
    from fedsca_pipeline.pipelines.progress.grid import GridProgress

logger = logging.getLogger(__name__)


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

    The cells that choose learning rates run first, then the rest of the grid. ``force`` runs all cells again, from
    their first round. ``site_inputs`` alternate manifest and arrays, one pair per site.

    Raises:
        ConfigError: no cell has a result.
    """
    from fedsca_pipeline.comparison import plan as plans
    from fedsca_pipeline.comparison.grid import Source
    from fedsca_pipeline.comparison.results import code_at_work, rates_of

    setting = plans.setting_of(plan)
    methods = plans.resolve_methods(setting)
    pairs = zip(site_inputs[::2], site_inputs[1::2], strict=True)
    sites = {str(manifest["site"].iloc[0]): (path, manifest) for manifest, path in pairs}
    jobs = setting.config.jobs or available_cores()
    source = Source(sites, foundations, scratch, code_at_work())
    with _Grid(source, jobs, None if force else finished, same_code=setting.config.same_code) as grid:
        tuning = list(plans.unique(plans.tuning_cells(methods, setting)))
        yield from grid.run(tuning)
        cells = plans.cells(methods, setting, rates_of(plan, grid.known))
        yield from grid.run(list(plans.unique([*tuning, *cells])))
    if not grid.known:
        raise ConfigError("no cell of the comparison has a result; see the errors above")
    if grid.failed:
        logger.error("%s failed; the same command tries again", counted(len(grid.failed), "cell"))


class _Grid:
    """The cells of one command: ``known`` results, ``failed`` cells, and workers that start when a cell has to run.

    The grid reads results of earlier commands from ``finished``; with None it ignores them.
    """

    def __init__(self, source: Source, jobs: int, finished: Path | None, *, same_code: bool) -> None:
        self.known: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self._source, self._jobs = source, jobs
        self._finished, self._same_code = finished, same_code
        self._opened = ExitStack()
        self._work: tuple[WorkerPool, GridProgress] | None = None

    def __enter__(self) -> _Grid:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def run(self, grid: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Run the cells that have neither a result nor failed, and yield their results. Fingerprints are unique."""
        from fedsca_pipeline.comparison.grid import Failed, run_grid
        from fedsca_pipeline.comparison.results import validation_dice

        wanted = {cell.fingerprint: cell for cell in grid}
        self._look_up([cell for name, cell in wanted.items() if name not in self.known | self.failed])
        todo = [cell for name, cell in wanted.items() if name not in self.known | self.failed]
        logger.info("%d of %s have a result", len(wanted.keys() & self.known), counted(len(wanted), "cell"))
        if not todo:
            return
        pool, progress = self._open()
        progress.expect(len(wanted), done=len(wanted) - len(todo))
        for cell, outcome in run_grid(pool, todo):
            if isinstance(outcome, Failed):
                self.failed[cell.fingerprint] = outcome.reason
                logger.error("%s: failed and is left out: %s", cell, outcome.reason)
                progress.cell_done(cell, "failed")
                continue
            self.known[cell.fingerprint] = outcome
            progress.cell_done(cell, f"validation Dice {validation_dice(outcome):.3f}, {outcome['seconds']:.0f} CPU s")
            yield {cell.fingerprint: outcome}

    def _look_up(self, unknown: Sequence[Cell]) -> None:
        if self._finished is None:
            for cell in unknown:
                shutil.rmtree(self._source.scratch / cell.fingerprint, ignore_errors=True)
            return
        from fedsca_pipeline.comparison.results import read_known

        known, refused = read_known(unknown, self._finished, same_code=self._same_code)
        self.known |= known
        if refused:
            logger.warning(
                "another version of the code made %s; the cells run again (comparison.same_code: false uses the "
                "results)",
                counted(refused, "result"),
            )

    def _open(self) -> tuple[WorkerPool, GridProgress]:
        if self._work is None:
            from fedsca_pipeline.comparison.grid import open_grid
            from fedsca_pipeline.pipelines.progress.grid import GridProgress

            progress = self._opened.enter_context(GridProgress())
            self._work = self._opened.enter_context(open_grid(self._source, self._jobs, progress.round_done)), progress
        return self._work


def report_comparison(
    plan: dict[str, Any], finished: Path, _: Any
) -> tuple[dict[str, str], Any, Any, Any, str, str, dict[str, Any]]:
    """Return the cells' names by fingerprint, then table, tests, unseen sites, the page, the HTML page and figures.

    The report uses the results in ``finished`` that ``run_cells`` would not compute again; ``run_cells`` runs before.
    """
    from fedsca_pipeline.comparison import plan as plans
    from fedsca_pipeline.comparison.report import Comparison, build_report
    from fedsca_pipeline.comparison.results import code_at_work, rates_of, read_known

    setting = plans.setting_of(plan)
    methods = plans.resolve_methods(setting)
    tuning = plans.tuning_cells(methods, setting)
    known = read_known(tuning, finished, same_code=setting.config.same_code)[0]
    rates = rates_of(plan, known)
    grid = [*tuning, *plans.cells(methods, setting, rates)]
    known |= read_known(
        [cell for cell in grid if cell.fingerprint not in known], finished, same_code=setting.config.same_code
    )[0]
    index = {cell.fingerprint: str(cell) for cell in plans.unique(grid) if cell.fingerprint in known}
    found = build_report(Comparison(setting, methods, known, rates, code_at_work()))
    return index, found.table, found.tests, found.unseen, found.page, found.html, found.figures
