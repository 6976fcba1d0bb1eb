from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.config import RunConfig
from fedsca_pipeline.federation.devices import deterministic, resolve_device, stream_seed

places = st.tuples(st.integers(0, 9), st.sampled_from(["a", "b"]), st.integers(0, 9))


@given(places, places)
def test_streams_differ_exactly_where_their_places_differ(first, second) -> None:
    assert (stream_seed(*first) == stream_seed(*second)) == (first == second)


def test_auto_finds_a_device() -> None:
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_threads_and_determinism_are_put_back() -> None:
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()

    with deterministic(RunConfig(device="cpu"), threads + 1) as device:
        assert device.type == "cpu"
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()

    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == before
