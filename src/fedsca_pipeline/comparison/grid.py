"""Run the cells that have no result in parallel worker processes; report failed cells and continue."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsca_pipeline.comparison.cell import CellInputs, Result, run_cell
from fedsca_pipeline.comparison.plan import Cell, cells, resolve_methods, setting_of, tuning_cells, unique
from fedsca_pipeline.comparison.results import rates_of, read_known, validation_dice
from fedsca_pipeline.config import ComparisonConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.errors import ConfigError, FedscaError, counted
from fedsca_pipeline.federation.fleets.registry import available_cores
from fedsca_pipeline.federation.fleets.worker_pool import Died, Raised, WorkerPool

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Source:
    """What a worker needs to run cells, picklable (see ``CellInputs``); ``sites``: array file and manifest by site."""

    sites: Mapping[str, tuple[Path, pd.DataFrame]]
    foundations: Path
    scratch: Path
    code: str


@dataclass(frozen=True)
class RoundDone:
    """A cell's progress report: ``done`` of ``rounds`` rounds are finished."""

    cell: Cell
    done: int
    rounds: int


@dataclass(frozen=True)
class Failed:
    """A cell that failed, with the reason."""

    reason: str


class Watch(Protocol):
    """Shows the progress of a grid."""

    def expect(self, cells: int, *, done: int) -> None:
        """Set the number of cells, and how many of them have a result."""

    def round_done(self, progress: RoundDone) -> None:
        """Report a cell's finished round."""

    def cell_done(self, cell: Cell, note: str) -> None:
        """Report a finished or failed cell."""


def run_comparison(plan: Mapping[str, Any], grid: Grid) -> Iterator[dict[str, Result]]:
    """Run a plan's cells that have no result, and yield each result by its fingerprint when its cell ends.

    The cells that choose learning rates run first, then the rest of the grid.

    Raises:
        ConfigError: no cell has a result.
    """
    setting = setting_of(plan)
    methods = resolve_methods(setting)
    tuning = list(unique(tuning_cells(methods, setting)))
    yield from grid.run(tuning)
    yield from grid.run(list(unique([*tuning, *cells(methods, setting, rates_of(plan, grid.known))])))
    if not grid.known:
        raise ConfigError("no cell of the comparison has a result; see the errors above")
    if grid.failed:
        logger.error("%s failed; the same command tries again", counted(len(grid.failed), "cell"))


class Grid:
    """The cells of one command: ``known`` results, ``failed`` cells, and workers that start when a cell has to run.

    Args:
        source: what workers need.
        config: its ``jobs`` and ``same_code``.
        finished: folder of earlier results; None ignores and removes what earlier commands left.
        watch: opens the progress display when a cell has to run.
    """

    def __init__(
        self,
        source: Source,
        config: ComparisonConfig,
        finished: Path | None,
        watch: Callable[[], AbstractContextManager[Watch]],
    ) -> None:
        self.known: dict[str, Result] = {}
        self.failed: dict[str, str] = {}
        self._source, self._config, self._finished, self._watch = source, config, finished, watch
        self._opened = ExitStack()
        self._work: tuple[WorkerPool[Cell, Result], Watch] | None = None

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def run(self, wanted_cells: Sequence[Cell]) -> Iterator[dict[str, Result]]:
        """Run the cells that have neither a result nor failed, and yield their results. Fingerprints are unique."""
        wanted = {cell.fingerprint: cell for cell in wanted_cells}
        self._look_up([cell for name, cell in wanted.items() if name not in self.known | self.failed])
        todo = [cell for name, cell in wanted.items() if name not in self.known | self.failed]
        logger.info("%d of %s have a result", len(wanted.keys() & self.known), counted(len(wanted), "cell"))
        if not todo:
            return
        pool, watch = self._open()
        watch.expect(len(wanted), done=len(wanted) - len(todo))
        for cell, outcome in run_grid(pool, todo):
            if isinstance(outcome, Failed):
                self.failed[cell.fingerprint] = outcome.reason
                logger.error("%s: failed and is left out: %s", cell, outcome.reason)
                watch.cell_done(cell, "failed")
                continue
            self.known[cell.fingerprint] = outcome
            watch.cell_done(cell, f"validation Dice {validation_dice(outcome):.3f}, {outcome['seconds']:.0f} CPU s")
            yield {cell.fingerprint: outcome}

    def _look_up(self, unknown: Sequence[Cell]) -> None:
        if self._finished is None:
            for cell in unknown:
                shutil.rmtree(self._source.scratch / cell.fingerprint, ignore_errors=True)
            return
        known, refused = read_known(unknown, self._finished, same_code=self._config.same_code)
        self.known |= known
        if refused:
            logger.warning(
                "another version of the code made %s; the cells run again (comparison.same_code: false uses the "
                "results)",
                counted(refused, "result"),
            )

    def _open(self) -> tuple[WorkerPool[Cell, Result], Watch]:
        if self._work is None:
            watch = self._opened.enter_context(self._watch())
            jobs = self._config.jobs or available_cores()
            self._work = self._opened.enter_context(open_grid(self._source, jobs, watch.round_done)), watch
        return self._work


def open_grid(source: Source, jobs: int, on_round: Callable[[RoundDone], None]) -> WorkerPool[Cell, Result]:
    """Return a pool of ``jobs`` workers, a context manager. ``on_round`` receives the cells' progress reports."""
    return WorkerPool(_start, source, settings=range(jobs), on_report=on_round)


def run_grid(pool: WorkerPool[Cell, Result], todo: Iterable[Cell]) -> Iterator[tuple[Cell, Result | Failed]]:
    """Yield each cell with its result or failure, in order of completion.

    Raises:
        Exception: a worker could not start.
    """
    for cell, outcome in pool.run(todo):
        match outcome:
            case Died(reason):
                yield cell, Failed(reason)
            case Raised(error):
                yield cell, Failed(str(error) if isinstance(error, FedscaError) else _with_notes(error))
            case result:
                yield cell, result


def _with_notes(error: Exception) -> str:
    return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


@contextmanager
def _start(source: Source, worker: int) -> Iterator[Callable[[Cell, Callable[[RoundDone], None]], Result]]:
    arrays = {site: SiteArrays(*parts) for site, parts in source.sites.items()}
    inputs = CellInputs(arrays, source.foundations, source.scratch, source.code, worker)
    yield lambda cell, report: run_cell(cell, inputs, lambda done, rounds: report(RoundDone(cell, done, rounds)))
