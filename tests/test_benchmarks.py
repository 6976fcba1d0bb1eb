"""What all benchmarks share: their clock."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def measure(project: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return benchmarks/measure.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("measure", project / "benchmarks" / "measure.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure", module)
    spec.loader.exec_module(module)
    return module


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
