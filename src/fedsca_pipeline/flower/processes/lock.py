"""A lock on a folder, which is free again when its holder is gone, and all to whom that has handed it down."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


class Held(Exception):  # noqa: N818 - what is so
    """Others hold the lock."""


@contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[TextIO]:
    """Hold the lock of the file at ``path``, which is made; yield it open.

    A process that inherits the open file (``pass_fds``) holds the lock, too, until it ends.

    Raises:
        Held: by others, still after ``seconds``.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    until = time.monotonic() + seconds
    with path.open("w") as file:
        while not _taken(file):
            if time.monotonic() >= until:
                raise Held(str(path))
            time.sleep(0.1)
        yield file


def _taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
