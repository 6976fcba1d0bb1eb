"""A file lock that is released when its holder and all child processes that inherit it have ended."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class LockHeld(Exception):  # noqa: N818 - a state
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[TextIO]:
    """Create the file at ``path`` and hold its lock for the duration of the block; yield the open file.

    A process that inherits the open file (``pass_fds``) also holds the lock, until it ends.

    Raises:
        LockHeld: another process still holds the lock after ``seconds``.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    until = time.monotonic() + seconds
    with path.open("w") as file:
        while not _try_lock(file):
            if time.monotonic() >= until:
                raise LockHeld(str(path))
            time.sleep(0.1)
        yield file


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
