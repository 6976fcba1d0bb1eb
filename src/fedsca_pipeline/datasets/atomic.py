"""Atomic saving for any file dataset of kedro-datasets."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from fedsca_pipeline.files import atomic_path


class AtomicSave:
    """Mixin before a kedro-datasets class: a failed save (full disk, Ctrl-C) leaves the earlier file unchanged."""

    _filepath: PurePosixPath

    def save(self, data: Any) -> None:
        """Save to a temporary file and rename it to the target."""
        target = self._filepath
        with atomic_path(Path(target)) as temporary:
            self._filepath = PurePosixPath(temporary)
            try:
                super().save(data)  # type: ignore[misc]  # a mixin: the class after it saves
            finally:
                self._filepath = target
