"""Cells that run in worker processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fedsca_pipeline.comparison.grid import Failed, RoundDone, Source, open_grid, run_grid
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.federation.fleets.worker_pool import Died, Raised


def test_a_cell_that_died_or_raised_has_failed_with_its_reason(make_setting, grid) -> None:
    cells = grid(make_setting(seeds=[0, 1]))
    bug = ZeroDivisionError("division by zero")
    bug.add_note("In a cell:\nTraceback of the worker")

    class Pool:
        def run(self, tasks):
            yield from zip(
                tasks, [Died("exit code -9"), Raised(DataError("b: no test image")), Raised(bug), {"a": 1}], strict=True
            )

    found = [outcome for _, outcome in run_grid(Pool(), cells[:4])]

    assert found == [
        Failed("exit code -9"),
        Failed("b: no test image"),
        Failed("ZeroDivisionError: division by zero\nIn a cell:\nTraceback of the worker"),
        {"a": 1},
    ]


def test_cells_run_in_parallel_and_report_their_rounds(make_setting, make_site, grid, tmp_path: Path) -> None:
    cells = grid(make_setting({"local": {}}, reference="local", seeds=[0, 1]))
    (broken,) = grid(
        make_setting(
            {"local": {"set": {"federation.inject_failures": {site: [1] for site in "abc"}}}}, reference="local"
        )
    )
    sources = {site: make_site(site, seed) for seed, site in enumerate("abc")}
    reports: list[RoundDone] = []

    with open_grid(Source(sources, Path("unused"), tmp_path / "scratch", "code"), 2, reports.append) as pool:
        found = {cell.fingerprint: outcome for cell, outcome in run_grid(pool, [broken, *cells])}

    assert isinstance(found[broken.fingerprint], Failed)
    assert found[broken.fingerprint].reason.startswith("round 1: 0 valid replies")
    for cell in cells:
        assert found[cell.fingerprint]["code"] == "code"
        assert [report.done for report in reports if report.cell == cell] == [1, 2, 2]
        assert not (tmp_path / "scratch" / cell.fingerprint).exists()


# A new interpreter with mapped memory: the heap of this one may keep memory that other tests have freed.
TWO_BLOCKS = """
import json, mmap
from fedsca_pipeline.comparison.peak_memory import PeakMemory

with PeakMemory() as first:
    with mmap.mmap(-1, 64 << 20) as block:
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
with PeakMemory() as second:
    pass
print(json.dumps([first.bytes, second.bytes]))
"""


def test_each_block_has_its_own_peak_memory() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_BLOCKS], capture_output=True, text=True, check=True)

    first, second = json.loads(done.stdout)
    if first is not None:
        assert first - second > 32 << 20
