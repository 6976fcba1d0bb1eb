"""Interactive and still figures."""

from __future__ import annotations

from kedro_datasets.matplotlib import MatplotlibDataset
from kedro_datasets.plotly import JSONDataset

from fedsca_pipeline.datasets.atomic import AtomicSave


class AtomicPlotlyDataset(AtomicSave, JSONDataset):
    """``plotly.JSONDataset``, saved atomically."""


class AtomicMatplotlibDataset(AtomicSave, MatplotlibDataset):
    """``matplotlib.MatplotlibDataset``, saved atomically."""
