"""What workers are forked from: its allocator, and that nothing of it stays in this process."""

from __future__ import annotations

import os
import signal

import pytest

from fedsca_pipeline.federation.fleets import forkserver


@pytest.mark.skipif(forkserver.METHOD != "forkserver", reason="workers are not forked here")
def test_workers_keep_their_memory_and_know_no_ctrl_c_and_this_process_is_as_it_was() -> None:
    before = dict(os.environ)

    forkserver.start()
    with forkserver.context().Pool(1) as workers:
        tunables = workers.apply(os.getenv, ("GLIBC_TUNABLES",))
        held_back = workers.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ()))

    assert signal.SIGINT in held_back
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert tunables == "glibc.malloc.hugetlb=1"
    assert dict(os.environ) == before
