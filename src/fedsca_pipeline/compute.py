"""Where tensors live: device choice, threads, autocast and determinism, set once at the start of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import cycle, islice

import torch

from fedsca_pipeline.config import FederationConfig, RunConfig
from fedsca_pipeline.errors import ConfigError

_AVAILABLE = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "cpu": lambda: True,
}


def resolve_device(name: str) -> torch.device:
    """Return the device that ``run.device`` means here: ``auto`` is the first of CUDA, MPS and CPU there is.

    Raises:
        ConfigError: the named device is not available.
    """
    if name == "auto":
        name = next(candidate for candidate, available in _AVAILABLE.items() if available())
    if not _AVAILABLE[name]():
        raise ConfigError(f"run.device: {name} is not available on this machine; use auto or cpu")
    return torch.device(name)


@contextmanager
def deterministic(config: RunConfig, threads: int) -> Iterator[torch.device]:
    """Run a block with ``threads`` torch threads and deterministic kernels on the configured device, then undo both."""
    device = resolve_device(config.device)
    # cuBLAS reads this when its first handle is made; without it deterministic matrix products raise.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads_before, deterministic_before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills_before = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    # It would write NaN into all fresh memory, a check for programs that read what they have not written.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield device
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic_before)
        torch.utils.deterministic.fill_uninitialized_memory = fills_before


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast on a CUDA device that has bf16, nothing elsewhere (CPUs without AMX are slower with it)."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def stream_seed(*place: object) -> int:
    """Return the seed of one random stream, a 32-bit number fixed by where it is used.

    Streams are derived, never carried along: a resumed run draws what the unbroken one would have drawn.

    >>> stream_seed(0, "site_a", 3) == stream_seed(0, "site_a", 3) != stream_seed(0, "site_b", 3)
    True
    """
    key = "/".join(map(str, place))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def worker_devices(
    device: torch.device, config: FederationConfig, *, threads: int, cores: int, sites: int
) -> tuple[torch.device, ...]:
    """Return the device of each worker process, at least one and at most one for each of a round's sites.

    Args:
        device: kind of device that the run computes on.
        config: ``workers`` and ``devices``: ``auto`` takes, on CUDA, every device and one worker on each; on the CPU as
            many workers as there are cores for; elsewhere one.
        threads: of one site.
        cores: that this process may use.
        sites: of the whole run.

    Raises:
        ConfigError: ``devices`` names one that is not there.
    """
    on_cuda = device.type == "cuda"
    if config.devices and not on_cuda:
        raise ConfigError(f"federation.devices numbers CUDA devices, but this run is on {device.type}; set it to auto")
    devices = _numbered(device, config) if on_cuda else [device]
    workers = config.workers or (cores // threads if device.type == "cpu" else len(devices))
    return tuple(islice(cycle(devices), max(1, min(workers, config.drawn(sites)))))


def _numbered(device: torch.device, config: FederationConfig) -> list[torch.device]:
    count = torch.cuda.device_count()
    numbers = config.devices or range(count)
    if missing := sorted(set(numbers).difference(range(count))):
        raise ConfigError(f"federation.devices: there is no CUDA device {missing[0]} here, only 0 to {count - 1}")
    return [torch.device(device.type, number) for number in numbers]
