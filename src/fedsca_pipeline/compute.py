"""Device, threads, autocast, determinism and random streams of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from fedsca_pipeline.config import RunConfig
from fedsca_pipeline.errors import ConfigError

_AVAILABLE: Mapping[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "cpu": lambda: True,
}


def resolve_device(name: str) -> torch.device:
    """Return the device for ``run.device``; ``auto`` is the first available one of CUDA, MPS and CPU.

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
    """Yield the configured device and run the block with ``threads`` torch threads and deterministic kernels.

    Both settings are restored after the block.
    """
    device = resolve_device(config.device)
    # cuBLAS reads this variable at its first use; without it deterministic matrix products raise.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    threads_before, deterministic_before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    # Any: torch sets the attribute up at run time.
    memory: Any = torch.utils.deterministic
    fills_before = memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    # Filling new memory with NaN would only help programs that read memory before they write it.
    memory.fill_uninitialized_memory = False
    try:
        yield device
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic_before)
        memory.fill_uninitialized_memory = fills_before


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return bf16 autocast for a CUDA device with bf16, else an empty context: CPUs without AMX are slower with it."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()


def stream_seed(*place: object) -> int:
    """Return the seed of one random stream, a 32-bit number derived from where the stream is used.

    No stream's state is stored: a resumed run draws what an uninterrupted run would have drawn.

    >>> stream_seed(0, "site_a", 3) == stream_seed(0, "site_a", 3) != stream_seed(0, "site_b", 3)
    True
    """
    key = "/".join(map(str, place))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
