"""The lock on a data root: one command at a time writes below it."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TextIO

from kedro.framework.hooks import hook_impl

from fedsca_pipeline.errors import UnavailableError
from fedsca_pipeline.files import LockHeld, open_locked

LOCK_FILE = ".lock"
"""Name of the locked file in a data root. It stays; only the lock on it counts, and that ends with the process."""


class RootLock:
    """The lock that this process holds, if any, from before a command writes until it ends."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def take(self, root: Path) -> None:
        """Lock a data root, and write into the lock's file who holds it. A lock that this process holds is released.

        Raises:
            UnavailableError: another process holds the lock; the message names it.
        """
        self.release()
        try:
            self._file = open_locked(root / LOCK_FILE)
        except LockHeld as holder:
            raise UnavailableError(
                f"{root}: in use by {str(holder) or 'another command'}; wait until it ends, stop it, or choose another "
                "folder with --params=data_root=<folder>"
            ) from holder
        command = " ".join(" ".join(["kedro", *sys.argv[1:]]).split())
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} ({command}), since {datetime.now():%Y-%m-%d %H:%M:%S}")
        self._file.flush()

    def release(self) -> None:
        """Release the lock, if this process holds one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Release the lock."""
        self.release()

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Release the lock."""
        self.release()
