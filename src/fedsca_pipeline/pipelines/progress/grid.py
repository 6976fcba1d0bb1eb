"""Live progress of the grid: one bar for all cells, one per running cell, and one permanent line per finished cell.

Without a terminal, which shows no bars, there is a line per round.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from fedsca_pipeline.comparison.grid import RoundDone
    from fedsca_pipeline.comparison.plan import Cell


class GridProgress:
    """A context manager that shows the progress of a grid."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            # Cells take minutes: a long estimation period steadies the remaining time.
            speed_estimate_period=3600,
        )
        self._done = 0
        self._all = self._bars.add_task("cells", total=0)
        self._running: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> GridProgress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bars.stop()

    def expect(self, total: int, done: int) -> None:
        """Set the number of cells, and how many of them have a result already."""
        self._done = done
        self._bars.update(self._all, total=total, completed=done)

    def round_done(self, report: RoundDone) -> None:
        """Show a finished round of a cell."""
        key = report.cell.fingerprint
        bar, _ = self._running.get(key) or (self._bars.add_task(str(report.cell), total=report.rounds), 0.0)
        self._bars.update(bar, completed=report.done)
        self._running[key] = bar, report.done / report.rounds
        if not self._bars.console.is_terminal:
            self._bars.console.print(
                f"{report.cell}: round {report.done} of {report.rounds}", highlight=False, markup=False
            )
        self._advance()

    def cell_done(self, cell: Cell, note: str) -> None:
        """Show that a cell has ended; ``note`` says how."""
        bar, _ = self._running.pop(cell.fingerprint, (None, 0.0))
        if bar is not None:
            self._bars.remove_task(bar)
        self._done += 1
        self._advance()
        self._bars.console.print(f"{cell}: {note}", highlight=False, markup=False)

    def _advance(self) -> None:
        self._bars.update(self._all, completed=self._done + sum(share for _, share in self._running.values()))
