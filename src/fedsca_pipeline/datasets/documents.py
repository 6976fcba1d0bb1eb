"""JSON documents."""

from __future__ import annotations

from kedro_datasets.json import JSONDataset

from fedsca_pipeline.datasets.atomic import AtomicSave


class AtomicJSONDataset(AtomicSave, JSONDataset):
    """``json.JSONDataset``, saved atomically."""
