"""The fork server: its allocator settings, and that this process stays unchanged."""

from __future__ import annotations

import os
import signal

import pytest

from fedsca_pipeline.federation.fleets import forkserver


@pytest.mark.skipif(forkserver.METHOD != "forkserver", reason="workers are not forked here")
def test_workers_reuse_memory_and_ignore_ctrl_c_and_this_process_is_unchanged() -> None:
    before = dict(os.environ)

    forkserver.start()
    with forkserver.context().Pool(1) as workers:
        tunables = workers.apply(os.getenv, ("GLIBC_TUNABLES",))
        held_back = workers.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ()))

    assert signal.SIGINT in held_back
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert tunables == "glibc.malloc.hugetlb=1"
    assert dict(os.environ) == before
