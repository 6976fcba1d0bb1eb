"""Where tensors live: device choice, threads, autocast and determinism, set once at the start of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from fedsca_pipeline.config import RunConfig
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
