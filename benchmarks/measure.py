"""Shared by all benchmarks: measure candidates in turn, report medians with their spread as a table and a JSON file.

A figure is a ratio against a baseline of the same run. Candidates take turns, in an order that reverses with every
repetition, so that a slow minute of the machine affects all of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Ratio:
    """A measured quantity relative to its baseline, one ratio per repetition, and the limit of the median.

    ``limit`` is the largest ratio allowed, or the smallest if ``at_least``.
    If the limit is absolute, ``baseline`` is its unit.
    """

    what: str
    baseline: str
    ratios: Sequence[float]
    limit: float
    at_least: bool = False

    @property
    def median(self) -> float:
        """Return the median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def holds(self) -> bool:
        """Return whether the median is within the limit."""
        return self.median >= self.limit if self.at_least else self.median <= self.limit


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call, in seconds; work that it gives to a GPU is finished in it."""
    start = _now()
    work()
    return _now() - start


def _now() -> float:
    """Return a time in seconds, after the work that this process has given to a GPU."""
    # A benchmark that has not imported torch has given none.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(candidates: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Call the candidates in turn; return the values that each returned, one per repetition.

    Every other repetition calls them in reverse order.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(repetitions):
        for name in sorted(candidates, reverse=bool(repetition % 2)):
            found[name].append(candidates[name]())
    return found


def ratios(measured: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return measured / baseline, one ratio per repetition."""
    return [value / reference for value, reference in zip(measured, baseline, strict=True)]


def machine(threads: int | None = None) -> dict[str, Any]:
    """Return what a figure depends on: processor family, cores, memory, library versions, torch threads."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
    }


def report(name: str, findings: Sequence[Ratio], details: Mapping[str, Any], *, threads: int | None = None) -> None:
    """Print the table and write ``results/<name>.json``: machine, ratios, limits, and ``details`` unchanged."""
    table = Table("what", "baseline", "median", "lowest to highest", "limit", "holds", title=name)
    for finding in findings:
        table.add_row(
            finding.what,
            finding.baseline,
            f"{finding.median:.3g}",
            f"{min(finding.ratios):.3g} to {max(finding.ratios):.3g}",
            f"{'at least' if finding.at_least else 'at most'} {finding.limit:g}",
            "yes" if finding.holds else "NO",
        )
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    rows = [asdict(finding) | {"median": finding.median, "holds": finding.holds} for finding in findings]
    content = {"machine": machine(threads), "ratios": rows, **details}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
