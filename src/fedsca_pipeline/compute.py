"""Device, threads, autocast, determinism and random streams of a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def device_of_worker(name: str, worker: int) -> torch.device:
    """Return the device of a worker process under ``run.device``.

    On CUDA workers 0, 1, ... are dealt over the visible devices, over and over; ``CUDA_VISIBLE_DEVICES`` chooses and
    numbers them. Elsewhere all workers have the one device.

    Raises:
        ConfigError: the named device is not available.
    """
    device = resolve_device(name)
    return torch.device("cuda", worker % torch.cuda.device_count()) if device.type == "cuda" else device


def processor_of(device: torch.device) -> str:
    """Return the model of a GPU, such as ``NVIDIA H200``, or the kind of another device; equal GPUs round equally."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# With strict determinism the backward passes of these three repeat to the bit; cuDNN's does not.
_REPEATABLE_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_CUBLAS, _CUBLAS_REPEATABLE = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def deterministic(config: RunConfig, threads: int, number: int | None = None) -> Iterator[torch.device]:
    """Yield the configured device and run the block with ``threads`` torch threads and deterministic kernels.

    On the CPU and on CUDA an operation without a deterministic kernel raises; on MPS it warns. Every setting but
    ``CUBLAS_WORKSPACE_CONFIG`` is restored after the block.

    Args:
        config: its ``device``.
        threads: torch threads.
        number: of the CUDA device, as ``CUDA_VISIBLE_DEVICES`` leaves them; None: the current one. Other kinds of
            device have no number.

    Raises:
        ConfigError: the device is not available, or matrix products on CUDA would not be repeatable.
    """
    device = resolve_device(config.device)
    threads_before = torch.get_num_threads()
    before, warned_before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # Any: torch sets the attribute up at run time.
    memory: Any = torch.utils.deterministic
    fills_before = memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    # Not a warning on CUDA: with it, flash and memory-efficient attention keep a backward pass that does not repeat.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "mps")
    # Filling new memory with NaN would only help programs that read memory before they write it.
    memory.fill_uninitialized_memory = False
    try:
        with _on_cuda(number) if device.type == "cuda" else nullcontext(device) as chosen:
            yield chosen
    finally:
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(before, warn_only=warned_before)
        memory.fill_uninitialized_memory = fills_before


@contextmanager
def _on_cuda(number: int | None) -> Iterator[torch.device]:
    """Run a block on one CUDA device, with matrix products and attention that repeat to the bit."""
    _make_cublas_repeatable()
    current = nullcontext() if number is None else torch.cuda.device(number)
    with current, sdpa_kernel(list(_REPEATABLE_ATTENTION)):
        yield torch.device("cuda") if number is None else torch.device("cuda", number)


def _make_cublas_repeatable() -> None:
    """Set the workspace with which cuBLAS repeats its products. It reads the variable once, when CUDA starts."""
    wanted = " or ".join(_CUBLAS_REPEATABLE)
    found = os.environ.get(_CUBLAS)
    if found is None and torch.cuda.is_initialized():
        raise ConfigError(
            f"run.device: CUDA started before {_CUBLAS} was set, so matrix products may differ from run to run; set "
            f"it to {wanted} before the command starts, or use run.device: cpu"
        )
    if found is not None and found not in _CUBLAS_REPEATABLE:
        raise ConfigError(
            f"run.device: with {_CUBLAS}={found} matrix products on CUDA may differ from run to run; set it to "
            f"{wanted}, or unset it"
        )
    os.environ.setdefault(_CUBLAS, _CUBLAS_REPEATABLE[0])


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bf16 for a CUDA device that computes in it, else None, which is fp32.

    A GPU older than Ampere emulates bf16, which is slower than fp32. fp16 is no substitute: its gradients underflow
    without a loss scaler, and a scaler leaves out steps. CPUs without AMX are slower with bf16.
    """
    real = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if real else None


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return autocast to ``autocast_dtype``, or an empty context if that is None."""
    dtype = autocast_dtype(device)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def stream_seed(*place: object) -> int:
    """Return the seed of one random stream, a 32-bit number derived from where the stream is used.

    No stream's state is stored: a resumed run draws what an uninterrupted run would have drawn.

    >>> stream_seed(0, "site_a", 3) == stream_seed(0, "site_a", 3) != stream_seed(0, "site_b", 3)
    True
    """
    key = "/".join(map(str, place))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
