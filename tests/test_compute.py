"""Device, threads, determinism, precision and random streams; on a machine with a GPU also that they hold there."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline import compute
from fedsca_pipeline.compute import autocast, deterministic, resolve_device, stream_seed
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, RunConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.fleets.processes import worker_devices
from fedsca_pipeline.federation.site.losses import build_loss
from fedsca_pipeline.federation.site.steps import local_step
from fedsca_pipeline.model.adapters.attach import attach_adapters
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation import load_foundation

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


CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that this machine has CUDA, not started yet; return the numbers of the devices that become current."""
    made_current: list[int] = []

    @contextmanager
    def device(number: int):
        made_current.append(number)
        yield

    monkeypatch.setattr(compute, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.delenv(CUBLAS, raising=False)
    return made_current


CUDA = RunConfig(device="cuda")


def test_on_cuda_an_operation_that_does_not_repeat_is_an_error(pretend_cuda) -> None:
    with deterministic(CUDA, 1) as device:
        assert device == torch.device("cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_on_cuda_attention_never_uses_cudnn_whose_gradient_does_not_repeat(pretend_cuda) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()

    with deterministic(CUDA, 1):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()

    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("warns", [True, False])
def test_whether_determinism_only_warned_before_is_restored(warns: bool) -> None:
    before, warned = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=warns)
    try:
        with deterministic(RunConfig(device="cpu"), 1):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def test_cublas_gets_a_workspace_that_repeats(pretend_cuda) -> None:
    with deterministic(CUDA, 1):
        assert os.environ[CUBLAS] == ":4096:8"


def test_a_workspace_that_repeats_stays_as_the_user_set_it(pretend_cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")

    with deterministic(CUDA, 1):
        assert os.environ[CUBLAS] == ":16:8"


def test_a_workspace_that_does_not_repeat_is_refused_with_the_cure(pretend_cuda, monkeypatch) -> None:
    monkeypatch.setenv(CUBLAS, ":8192:2")

    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:8192:2 .* set it to :4096:8 or :16:8, or unset"):
        deterministic(CUDA, 1).__enter__()


def test_a_workspace_set_too_late_is_refused_with_the_cure(pretend_cuda, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    with pytest.raises(ConfigError, match=r"CUDA started before CUBLAS_WORKSPACE_CONFIG was set.* before the command"):
        deterministic(CUDA, 1).__enter__()


def test_the_numbered_device_is_the_current_one(pretend_cuda) -> None:
    with deterministic(CUDA, 1, 3) as device:
        assert device == torch.device("cuda", 3)

    assert pretend_cuda == [3]


def test_no_device_is_made_current_without_a_number(pretend_cuda) -> None:
    with deterministic(CUDA, 1):
        pass

    # To make one current would start CUDA, also in a process whose workers alone compute.
    assert pretend_cuda == []


def test_several_workers_share_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    found = worker_devices(torch.device("cuda"), FederationConfig(workers=4), threads=1, cores=1, sites=9)

    assert found == (torch.device("cuda", 0),) * 4


@pytest.mark.parametrize(("emulated", "real"), [(True, False), (False, False)])
def test_bf16_that_the_gpu_only_emulates_is_not_used(emulated: bool, real: bool, monkeypatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: emulated if including_emulation else real
    )

    assert isinstance(autocast(torch.device("cuda")), nullcontext)


def train(device: torch.device, architecture: str, head: str, dtype: str) -> tuple[list[float], list[torch.Tensor]]:
    """Return the losses of three steps on random images, and the trained tensors."""
    foundation = FoundationConfig(name="random", architecture=architecture, head=head)
    model = load_foundation(foundation, Path("unused"), image_size=64, classes=2)
    attach_adapters(model, AdaptersConfig(width=4)).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=draw)
    masks = torch.randint(0, 3, (2, 64, 64), generator=draw, dtype=torch.uint8)
    batch = Batch(images, masks, torch.ones(2, 64, 64, dtype=torch.bool)).to(device)

    def forward(batch: Batch) -> torch.Tensor:
        return model(model.normalise(batch.inputs, batch.valid.unsqueeze(1)))

    loss = build_loss(head, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        if dtype == "fp32":
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
        losses = [local_step(forward, batch, loss, optimiser, 1.0, lambda: None) for _ in range(3)]
    return [float(loss) for loss in losses], [p.detach().cpu() for p in parameters]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("cpu", "fp32"), pytest.param("cuda", "fp32", marks=on_cuda), pytest.param("cuda", "bf16", marks=on_cuda)],
)
@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
@pytest.mark.parametrize("architecture", ["tiny_vit", "sam_vit"])
def test_training_repeats_to_the_bit_and_warns_of_nothing(architecture, head: str, kind: str, dtype: str) -> None:
    with deterministic(RunConfig(device=kind), 1) as device, warnings.catch_warnings():
        warnings.simplefilter("error")
        (losses, first), (again, second) = (train(device, architecture, head, dtype) for _ in range(2))

    assert losses == again
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, first, second))


@on_cuda
def test_a_gpu_with_bf16_computes_in_bf16() -> None:
    with deterministic(CUDA, 1) as device, autocast(device):
        assert torch.is_autocast_enabled("cuda") == torch.cuda.is_bf16_supported(including_emulation=False)
