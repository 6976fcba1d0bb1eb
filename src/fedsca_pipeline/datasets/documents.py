"""JSON documents and texts."""

from __future__ import annotations

from typing import Any

from kedro_datasets.json import JSONDataset
from kedro_datasets.text import TextDataset

from fedsca_pipeline.datasets.atomic import AtomicSave


class AtomicJSONDataset(AtomicSave, JSONDataset):
    """``json.JSONDataset``, saved atomically."""


class GrowingJSONDataset(AtomicJSONDataset):
    """A JSON object to which each save adds its keys; a key that is there gets the new value."""

    def save(self, data: dict[str, Any]) -> None:
        """Save the object with the keys of the earlier one."""
        super().save({**(self.load() if self._exists() else {}), **data})


class AtomicTextDataset(AtomicSave, TextDataset):
    """``text.TextDataset``, saved atomically."""
