"""What all benchmarks share, their clock, and the one that needs a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def load(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a benchmark by name; benchmarks are scripts, in no package."""
    monkeypatch.syspath_prepend(project / "benchmarks")

    def imported(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return imported


@pytest.fixture
def measure(load: Callable[[str], ModuleType]) -> ModuleType:
    """Return benchmarks/measure.py."""
    return load("measure")


@pytest.mark.parametrize(
    ("started", "expected"), [(True, ["synchronise", "work", "synchronise"]), (False, ["work"])], ids=["cuda", "none"]
)
def test_the_clock_is_read_when_cuda_is_done(started: bool, expected: list[str], measure, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronise"))

    measure.seconds(lambda: done.append("work"))

    assert done == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_work_on_cuda_is_finished_when_the_clock_is_read(measure) -> None:
    matrix = torch.ones(8192, 8192, device="cuda")

    measure.seconds(lambda: [matrix @ matrix for _ in range(9)])

    assert torch.cuda.current_stream().query()


def test_the_benchmark_of_a_gpu_refuses_a_machine_without_one_in_one_line(load, monkeypatch) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py"])

    with pytest.raises(SystemExit) as ended:
        gpu.main()

    assert ended.value.code == "benchmarks/gpu.py needs a CUDA GPU, and torch finds none here"
