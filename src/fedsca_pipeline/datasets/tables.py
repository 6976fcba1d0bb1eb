"""CSV tables."""

from __future__ import annotations

import pandas as pd
from kedro_datasets.pandas import CSVDataset

from fedsca_pipeline.datasets.atomic import AtomicSave


class AtomicCSVDataset(AtomicSave, CSVDataset):
    """``pandas.CSVDataset``, saved atomically."""


class PreviousCSVDataset(CSVDataset):
    """The table of an earlier run: lets a node read its own last output."""

    def load(self) -> pd.DataFrame | None:
        """Return the table, or None if there is no file yet."""
        return super().load() if self._exists() else None
