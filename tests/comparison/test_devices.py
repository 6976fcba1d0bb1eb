"""Cells of a comparison are dealt over the GPUs of a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsca_pipeline import compute
from fedsca_pipeline.comparison import cell as cells
from fedsca_pipeline.comparison.grid import Source, _start
from fedsca_pipeline.compute import device_of_worker, processor_of

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has three GPUs."""
    monkeypatch.setattr(compute, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)


def test_workers_are_dealt_over_all_gpus(three_gpus) -> None:
    found = [device_of_worker("cuda", worker) for worker in range(5)]

    assert found == [torch.device("cuda", number) for number in (0, 1, 2, 0, 1)]


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_without_cuda_all_workers_have_one_device(kind: str, three_gpus) -> None:
    assert {device_of_worker(kind, worker) for worker in range(5)} == {torch.device(kind)}


class EnteredError(Exception):
    """Raised where a cell would begin to compute; its argument is the number of the GPU."""


@pytest.mark.parametrize(("worker", "number"), [(0, 0), (2, 2), (4, 1)])
def test_a_worker_s_cells_compute_on_its_gpu(
    worker: int, number: int, three_gpus, make_setting, make_site, grid, tmp_path: Path, monkeypatch
) -> None:
    def entered(_config, _threads, number):
        raise EnteredError(number)

    monkeypatch.setattr(cells, "deterministic", entered)
    cell = grid(make_setting(base={"run": {"device": "cuda"}}))[0]
    source = Source({site: make_site(site) for site in "abc"}, Path("unused"), tmp_path / "scratch", "code")

    with _start(source, worker) as work, pytest.raises(EnteredError, match=rf"^{number}$"):
        work(cell, lambda _: None)


def test_equal_gpus_are_one_processor_whatever_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for privacy is drawn anew for another processor, and only then: a repeated answer costs nothing."""
    names = {0: "NVIDIA H200", 1: "NVIDIA H200", 2: "NVIDIA L4"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])

    first, second, other = (processor_of(torch.device("cuda", number)) for number in names)

    assert first == second != other
    assert processor_of(torch.device("cpu")) == "cpu"


@on_cuda
def test_devices_that_the_environment_hides_are_not_used() -> None:
    code = "from fedsca_pipeline.compute import device_of_worker; print(device_of_worker('cuda', 5))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.split() == ["cuda:0"]
