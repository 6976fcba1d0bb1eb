from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from fedsca_pipeline.comparison.grid import RoundDone
from fedsca_pipeline.comparison.plan import Cell
from fedsca_pipeline.pipelines.progress.grid import GridProgress


def cell(seed: int) -> Cell:
    return Cell("fedsca", "fedsca", seed, 8, 0.01, None, ("a",), (), {"seed": seed})


@pytest.fixture
def watched() -> Callable[..., tuple[GridProgress, io.StringIO]]:
    """Return a progress that writes to a string, and that string."""

    def make() -> tuple[GridProgress, io.StringIO]:
        stream = io.StringIO()
        return GridProgress(Console(file=stream, width=120)), stream

    return make


def test_without_a_terminal_each_round_and_each_finished_cell_leave_one_line(watched) -> None:
    progress, stream = watched()
    with progress:
        progress.expect(2, done=0)
        progress.round_done(RoundDone(cell(0), 1, 2))
        progress.cell_done(cell(0), "failed")

    name = "fedsca, seed 0, 8 images, rate 0.01"
    assert stream.getvalue().startswith(f"{name}: round 1 of 2\n{name}: failed\n")
    assert stream.getvalue().count("seed 0") == 2


def test_a_terminal_shows_rounds_in_bars_only() -> None:
    stream = io.StringIO()
    with GridProgress(Console(file=stream, width=120, force_terminal=True)) as progress:
        progress.round_done(RoundDone(cell(0), 1, 2))

    assert "round 1 of 2" not in stream.getvalue()


def test_running_cells_count_by_their_rounds(watched) -> None:
    progress, _ = watched()
    progress.expect(4, done=1)

    progress.round_done(RoundDone(cell(0), 1, 4))
    progress.round_done(RoundDone(cell(1), 2, 4))
    progress.round_done(RoundDone(cell(0), 2, 4))
    assert progress._bars.tasks[0].completed == 2.0
    progress.cell_done(cell(0), "done")
    assert progress._bars.tasks[0].completed == 2.5


def test_a_restarted_cell_does_not_count_twice(watched) -> None:
    progress, _ = watched()
    progress.expect(1, done=0)

    for done in (1, 2, 1):
        progress.round_done(RoundDone(cell(0), done, 4))

    assert progress._bars.tasks[0].completed == 0.25
    assert len(progress._bars.tasks) == 2


def test_new_expectations_start_from_the_known_results(watched) -> None:
    progress, _ = watched()
    progress.expect(2, done=0)
    progress.cell_done(cell(0), "done")
    progress.cell_done(cell(1), "done")

    progress.expect(5, done=2)

    assert (progress._bars.tasks[0].completed, progress._bars.tasks[0].total) == (2, 5)
