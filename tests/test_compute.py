"""Device, threads, determinism and random streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.compute import deterministic, resolve_device, stream_seed
from fedsca_pipeline.config import FederationConfig, RunConfig
from fedsca_pipeline.federation.fleets.processes import worker_devices

places = st.tuples(st.integers(0, 9), st.sampled_from(["a", "b"]), st.integers(0, 9))


@given(places, places)
def test_random_streams_differ_exactly_if_their_places_differ(first, second) -> None:
    assert (stream_seed(*first) == stream_seed(*second)) == (first == second)


def test_auto_finds_a_device() -> None:
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_threads_and_determinism_are_restored() -> None:
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory

    with deterministic(RunConfig(device="cpu"), threads + 1) as device:
        assert device.type == "cpu"
        assert not torch.empty(1000).isnan().all()  # new memory is not filled
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()

    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == before
    assert torch.utils.deterministic.fill_uninitialized_memory == fills


@pytest.mark.parametrize(
    ("config", "cores", "threads", "expected"),
    [
        ({}, 8, 2, 4),
        ({}, 8, 1, 5),  # one per site
        ({}, 1, 4, 1),
        ({"participation": 0.4}, 8, 1, 2),
        ({"workers": 3}, 1, 1, 3),
        ({"workers": 9}, 1, 1, 5),
    ],
)
def test_on_the_cpu_there_are_as_many_workers_as_cores_allow(config, cores: int, threads: int, expected: int) -> None:
    found = worker_devices(torch.device("cpu"), FederationConfig(**config), threads=threads, cores=cores, sites=5)

    assert found == (torch.device("cpu"),) * expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0, 1, 2]),
        ({"devices": [2]}, [2]),
        ({"workers": 4}, [0, 1, 2, 0]),
        ({"devices": [0, 2], "workers": 3}, [0, 2, 0]),
    ],
)
def test_workers_are_distributed_over_the_cuda_devices(config, expected: list[int], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    found = worker_devices(torch.device("cuda"), FederationConfig(**config), threads=1, cores=1, sites=5)

    assert found == tuple(torch.device("cuda", number) for number in expected)
