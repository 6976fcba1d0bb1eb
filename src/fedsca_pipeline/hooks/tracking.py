"""The hook that logs to MLflow: every data set that a command saves, and how the command ended."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog, MemoryDataset
from kedro.io.core import is_parameter
from kedro.pipeline.node import Node
from pydantic import ValidationError

from fedsca_pipeline.errors import ConfigError, RefusedImportError, TrackingError, faults_by_key
from fedsca_pipeline.tracking.comparison import ComparisonTracker
from fedsca_pipeline.tracking.forget import ForgettingWriter
from fedsca_pipeline.tracking.run import Tracker
from fedsca_pipeline.tracking.writer import TrackingConfig

logger = logging.getLogger(__name__)

# Saving one of these opens the MLflow run. A pipeline that logs saves one of them first.
_OPENERS = frozenset(
    {"run_description", "round_metrics", "site_models", "final_metrics", "volume_metrics", "learning_curves"}
)


class TrackingHooks:
    """Logs to MLflow what is saved. State lives from one command's start to its end.

    ``mlflow`` and ``comparison_mlflow``: id, experiment and tracking address of the MLflow runs that a finished command
    had open. The id is empty if there was none.
    """

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._comparison: ComparisonTracker | None = None
        self._catalog: DataCatalog | None = None
        self.mlflow: dict[str, str] = {}
        self.comparison_mlflow: dict[str, str] = {}

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read ``mlflow.yml``.

        Raises:
            ConfigError: one line per fault, each with its YAML key.
        """
        try:
            config = TrackingConfig.model_validate(context.config_loader["mlflow"])
        except ValidationError as error:
            raise ConfigError("\n".join(faults_by_key(error, "mlflow.yml"))) from error
        writer = (config, context.project_path, " ".join(["kedro", *sys.argv[1:]]))
        self._tracker, self._comparison = Tracker(*writer), ComparisonTracker(*writer)
        self._forgetting = ForgettingWriter(*writer)

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Add the data set ``forgetting``, through which a node deletes a site's runs."""
        catalog["forgetting"] = MemoryDataset(self._forgetting, copy_mode="assign")

    @hook_impl
    def before_pipeline_run(self, catalog: DataCatalog) -> None:
        """Keep the catalog, which knows where the files are."""
        self._catalog = catalog

    @hook_impl
    def before_node_run(self, node: Node, catalog: DataCatalog) -> None:
        """Record that an import was tried, however it ends."""
        if "import_summary" in node.outputs and not catalog.exists("import_summary"):
            catalog.save("import_summary", {})

    @hook_impl
    def on_node_error(self, error: Exception, catalog: DataCatalog) -> None:
        """Save the whole list of what a refused import found broken."""
        if isinstance(error, RefusedImportError):
            catalog.save("import_summary", error.found)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Log what was saved. The run's description opens the MLflow run."""
        if self._tracker is None or self._catalog is None or is_parameter(dataset_name):
            return
        if dataset_name.startswith("comparison_"):
            self._track_comparison(dataset_name, data)
            return
        if self._tracker.run_id is None and dataset_name in _OPENERS:
            self._open(data if dataset_name == "run_description" else self._catalog.load("run_description"))
        if self._tracker.run_id is None:
            return
        self._tracker.saved(dataset_name, data, filepath_of(dataset_name, self._catalog))
        if dataset_name == "site_models":
            self._tracker.log_models(self._catalog.load("models"))

    @hook_impl
    def after_pipeline_run(self) -> None:
        """End the MLflow runs. If MLflow fails here, the same command finds something left to do."""
        if self._tracker is None or self._comparison is None:
            return
        self.mlflow, self.comparison_mlflow = (
            {"run_id": tracker.run_id or "", "uri": tracker.uri, "experiment_id": tracker.experiment_id}
            for tracker in (self._tracker, self._comparison)
        )
        self._tracker.close("FINISHED")
        self._comparison.close("FINISHED")

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        """Mark the MLflow run as failed. The same command resumes it."""
        self._close("FAILED")

    def interrupted(self) -> None:
        """Mark the MLflow run as killed, since Kedro calls no hook on Ctrl-C. A second Ctrl-C does not wait for it."""
        with suppress(KeyboardInterrupt):
            self._close("KILLED")

    def _open(self, description: Mapping[str, Any]) -> None:
        """Open the MLflow run, and log what preprocessing saved before the fingerprint was known."""
        if self._tracker is None or self._catalog is None:
            return
        self._tracker.open(description)
        for site in description["data"]:
            self._tracker.saved(f"{site}.report", None, filepath_of(f"{site}.report", self._catalog))

    def _track_comparison(self, dataset_name: str, data: Any) -> None:
        if self._comparison is None or self._catalog is None:
            return
        if dataset_name == "comparison_plan":
            self._comparison.open(data)
        elif dataset_name == "comparison_cells":
            for result in data.values():
                self._comparison.cell(result)
        elif dataset_name == "comparison_figures":
            self._comparison.figures(data)
        elif dataset_name == "comparison_index":
            # Cells that another clone finished, or that finished while tracking was disabled.
            stored = self._catalog.load("comparison_cells")
            for name in data:
                self._comparison.cell(stored[name]())
        self._comparison.saved(dataset_name, filepath_of(dataset_name, self._catalog))

    def _close(self, status: str) -> None:
        """End the MLflow runs. A failure of MLflow does not hide what ended the command."""
        for tracker in (self._tracker, self._comparison):
            try:
                if tracker is not None:
                    tracker.close(status)
            except TrackingError as error:
                logger.warning("the MLflow run could not be marked as %s: %s", status, error)


def filepath_of(dataset_name: str, catalog: DataCatalog) -> Path | None:
    """Return the file of a data set, or None if it has none."""
    filepath = getattr(catalog.get(dataset_name), "_filepath", None)
    return Path(filepath) if filepath is not None else None
