"""The process that workers are forked from: it imports their modules once, while the run imports its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext

# On macOS imported frameworks break in a forked process.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"

# They import torch, PEFT and transformers: some CPU seconds. A worker's first message holds pandas tables.
_PRELOADED = ("fedsca_pipeline.federation.fleets.processes", "fedsca_pipeline.model.foundation.build", "pandas")

# A training step allocates and frees activations of many MB. By default glibc returns each block to the system and
# allocates it again, page by page; steps are faster if it reuses the memory, in huge pages if the system allows them
# (docs/performance.md). glibc reads this when a process starts, so only workers can get it without the user's help.
# Other C libraries ignore it.
_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


def context() -> BaseContext:
    """Return the multiprocessing context of workers; never ``fork``, which breaks torch's threads and CUDA."""
    return multiprocessing.get_context(METHOD)


def start() -> None:
    """Start the fork server, if the system has one and it is not running, and return at once."""
    if METHOD != "forkserver":
        return
    from multiprocessing import resource_tracker
    from multiprocessing.forkserver import ensure_running

    # Otherwise the fork server starts it, and that unblocks interrupts.
    resource_tracker.ensure_running()
    context().set_forkserver_preload(list(_PRELOADED))
    with interrupts_blocked(), _environment(_ALLOCATOR):
        ensure_running()


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C for a block. Processes started in it inherit this; their parent ends them instead."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Add environment variables for a block; variables that the user has set stay unchanged."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
