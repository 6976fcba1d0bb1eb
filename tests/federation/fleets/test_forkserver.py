"""The fork server: its allocator settings, what it imports, and that this process stays unchanged."""

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


@pytest.mark.skipif(forkserver.METHOD != "forkserver", reason="workers are not forked here")
def test_without_privacy_opacus_is_not_imported() -> None:
    """The fork server is a new interpreter that imports what a site's worker needs, and nothing of this process."""
    forkserver.start()
    with forkserver.context().Pool(1) as workers:
        names = ("opacus", "pandas", "fedsca_pipeline.federation.site.worker")
        imported = workers.apply(eval, (f"__import__('sys').modules.keys() & {set(names)}",))

    assert imported == {"pandas", "fedsca_pipeline.federation.site.worker"}
