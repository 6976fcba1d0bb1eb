"""Folders in which each file is a partition."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from kedro_datasets.partitions import PartitionedDataset

from fedsca_pipeline.files import remove_partial_files


class WholePartitionsDataset(PartitionedDataset):
    """``partitions.PartitionedDataset`` that ignores partial files of killed commands.

    A partial file is in a hidden folder beside its partition; saving the partition again removes it.
    """

    def save(self, data: dict[str, Any]) -> None:
        """Save each partition and remove its partial files. No other command may save the same partition meanwhile."""
        for name in data:
            target = Path(self._partition_to_path(name))
            remove_partial_files(target.parent, f"{target.name}.*")
        super().save(data)

    def _list_partitions(self) -> list[str]:
        found = super()._list_partitions()
        return [path for path in found if not _is_hidden(self._path_to_partition(path))]


def _is_hidden(partition: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(partition).parts)
