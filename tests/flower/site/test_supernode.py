"""The Flower processes of a site are restarted when they end or cannot start."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from fedsca_pipeline.flower.site import supernode


def test_a_process_that_cannot_be_started_is_started_again_later(tmp_path: Path, monkeypatch) -> None:
    stopped, tries = threading.Event(), []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        if len(tries) == 3:
            stopped.set()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(supernode, "LeashedProcess", fail)
    monkeypatch.setattr(supernode, "_RESTART_SECONDS", 0.01)
    with (tmp_path / "lock").open("w") as lock:
        supernode.keep_running(["flower-supernode"], {}, lock, stopped)

    assert len(tries) == 3
