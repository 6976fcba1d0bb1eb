"""The process that workers are forked from: it imports what they need once, while the run does the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext

# Apple's frameworks do not survive a fork once they are imported.
METHOD = "forkserver" if sys.platform == "linux" else "spawn"

# With all that it imports: torch, MONAI, PEFT, transformers, some ten CPU seconds.
_PRELOADED = ("fedsca_pipeline.federation.fleets.processes", "fedsca_pipeline.model.foundation.build")

# A training step allocates and frees activations of many MB. By default glibc gives each back to the system and takes
# it anew, page by page; kept, and in huge pages where the system allows, a step takes less (docs/performance.md).
# Read when a process starts, so that only workers can have it without the user's help. Other C libraries ignore it.
_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}


def context() -> BaseContext:
    """Return the multiprocessing context of workers. Plain ``fork`` is out: torch's threads and CUDA do not survive."""
    return multiprocessing.get_context(METHOD)


def start() -> None:
    """Start the fork server if it is not there, and return at once; where workers are spawned, do nothing."""
    if METHOD != "forkserver":
        return
    from multiprocessing import resource_tracker
    from multiprocessing.forkserver import ensure_running

    # The fork server would start it on its way, which lets interrupts in again.
    resource_tracker.ensure_running()
    context().set_forkserver_preload(list(_PRELOADED))
    with interrupts_blocked(), _environment(_ALLOCATOR):
        ensure_running()


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back from what this thread starts meanwhile, which inherits that: its parent ends it instead."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Add variables for what is started meanwhile; those that the user has set stay as they are."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
