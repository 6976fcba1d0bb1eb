"""Run cells in parallel worker processes: yield each result at once, report failed cells and continue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsca_pipeline.comparison.cell import CellInputs, Result, run_cell
from fedsca_pipeline.comparison.plan import Cell
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.errors import FedscaError
from fedsca_pipeline.federation.fleets.worker_pool import Died, Raised, WorkerPool

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


def open_grid(source: Source, jobs: int, on_round: Callable[[RoundDone], None]) -> WorkerPool[Cell, Result]:
    """Return a pool of ``jobs`` workers, a context manager. ``on_round`` receives the cells' progress reports."""
    return WorkerPool(_start, source, settings=range(jobs), on_report=on_round)


def run_grid(pool: WorkerPool[Cell, Result], cells: Iterable[Cell]) -> Iterator[tuple[Cell, Result | Failed]]:
    """Yield each cell with its result or failure, in order of completion.

    Raises:
        Exception: a worker could not start.
    """
    for cell, outcome in pool.run(cells):
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
def _start(source: Source, _place: int) -> Iterator[Callable[[Cell, Callable[[RoundDone], None]], Result]]:
    arrays = {site: SiteArrays(*parts) for site, parts in source.sites.items()}
    inputs = CellInputs(arrays, source.foundations, source.scratch, source.code)
    yield lambda cell, report: run_cell(cell, inputs, lambda done, rounds: report(RoundDone(cell, done, rounds)))
