"""A file lock is held by one process and those that inherit it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedsca_pipeline.flower.processes.lock import LockHeld, locked


def test_a_second_holder_is_refused_until_the_first_releases_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with locked(path), pytest.raises(LockHeld), locked(path):
        pass

    with locked(path):
        pass


def test_a_process_that_inherits_the_lock_holds_it_until_it_ends(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as lock:
        heir = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with pytest.raises(LockHeld), locked(tmp_path / "lock"):
        pass

    heir.communicate(b"\n")

    with locked(tmp_path / "lock"):
        pass


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as lock:
        heir = subprocess.Popen(["sleep", "0.5"], pass_fds=[lock.fileno()])

    with locked(tmp_path / "lock", 60.0):
        assert heir.wait() == 0
