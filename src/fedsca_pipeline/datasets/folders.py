"""Folders that nodes read or write themselves, and a site's cached arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset, DatasetError

if TYPE_CHECKING:
    from fedsca_pipeline.data.preprocessing.array_writer import ArraysFile


class FolderDataset(AbstractDataset[Any, Path]):
    """A folder: loads as its path and is created if missing. It cannot be saved; nodes write files inside it."""

    def __init__(self, path: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(path)
        self.metadata = metadata

    def load(self) -> Path:
        """Return the folder's path."""
        self._path.mkdir(parents=True, exist_ok=True)
        return self._path

    def save(self, data: Any) -> None:
        """Raise an error: nodes write into the folder themselves."""
        raise DatasetError(f"{self._path} is a folder; nodes write into it themselves")

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"path": str(self._path)}


class SiteArraysDataset(AbstractDataset["ArraysFile", Path]):
    """A site's cached arrays: one safetensors file, loaded as its path for memory-mapping.

    Saving moves a finished file to the dataset's path; both must be on the same disk.
    """

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Path:
        """Return the file's path."""
        if not self._exists():
            raise DatasetError(f"{self._filepath} is missing; run 'kedro run --pipeline=preprocessing' first")
        return self._filepath

    def save(self, data: ArraysFile) -> None:
        """Move the file to the dataset's path, atomically."""
        data.move_to(self._filepath)

    def _exists(self) -> bool:
        return self._filepath.is_file()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
