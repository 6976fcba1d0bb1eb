"""The project's data catalog."""

from __future__ import annotations

from typing import Any

from kedro.framework.context import CatalogCommandsMixin
from kedro.io import AbstractDataset, DataCatalog, MemoryDataset
from kedro.io.core import is_parameter


class ProjectCatalog(DataCatalog, CatalogCommandsMixin):
    """Kedro's catalog with deep copies of parameters.

    Kedro would import pandas to find out whether a parameter is a table, and so slow down every command.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        if is_parameter(key) and not isinstance(value, AbstractDataset):
            value = MemoryDataset(value, copy_mode="deepcopy")
        super().__setitem__(key, value)
