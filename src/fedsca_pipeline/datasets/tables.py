"""CSV tables. Text that a spreadsheet would run as a formula has an apostrophe before it in the file only."""

from __future__ import annotations

import pandas as pd
from kedro_datasets.pandas import CSVDataset

from fedsca_pipeline.datasets.atomic import AtomicSave
from fedsca_pipeline.files import as_cells, from_cells


class _SafeCSVDataset(CSVDataset):
    def load(self) -> pd.DataFrame:
        """Return the table as it was saved."""
        return from_cells(super().load())

    def save(self, data: pd.DataFrame) -> None:
        """Save the table; see ``files.as_cell``."""
        super().save(as_cells(data))


class AtomicCSVDataset(AtomicSave, _SafeCSVDataset):
    """``pandas.CSVDataset``, saved atomically."""


class PreviousCSVDataset(_SafeCSVDataset):
    """The table of an earlier run: lets a node read its own last output."""

    def load(self) -> pd.DataFrame | None:
        """Return the table, or None if there is no file yet."""
        return super().load() if self._exists() else None
