"""Live progress of the grid on the terminal: a bar for all cells, one for each at work; one line a cell stays."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fedsca_pipeline.comparison.grid import RoundDone
    from fedsca_pipeline.comparison.plan import Cell


class GridProgress:
    """A context manager that watches a grid."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            # The time left follows whole cells, which take minutes.
            speed_estimate_period=3600,
        )
        self._done = 0
        self._all = self._bars.add_task("cells", total=0)
        self._at_work: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> GridProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bars.stop()

    def expect(self, total: int, done: int) -> None:
        """Say how many cells there are, and how many of them have a result."""
        self._done = done
        self._bars.update(self._all, total=total, completed=done)

    def round_done(self, report: RoundDone) -> None:
        """Report a round of a cell."""
        key = report.cell.fingerprint
        bar, _ = self._at_work.get(key) or (self._bars.add_task(str(report.cell), total=report.rounds), 0.0)
        self._bars.update(bar, completed=report.done)
        self._at_work[key] = bar, report.done / report.rounds
        self._move()

    def cell_done(self, cell: Cell, note: str) -> None:
        """Report that a cell has ended, and how."""
        bar, _ = self._at_work.pop(cell.fingerprint, (None, 0.0))
        if bar is not None:
            self._bars.remove_task(bar)
        self._done += 1
        self._move()
        self._bars.console.print(f"{cell}: {note}", highlight=False, markup=False)

    def _move(self) -> None:
        self._bars.update(self._all, completed=self._done + sum(part for _, part in self._at_work.values()))
