"""Kedro hooks: find the sites, refuse bad parameters early, skip what is up to date, track the rest."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog
from kedro.io.core import is_parameter
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from pydantic import ValidationError

from fedsca_pipeline.data.site_folder.discovery import settle_sites
from fedsca_pipeline.errors import RefusedImportError, TrackingError
from fedsca_pipeline.federation.strategies import check_names
from fedsca_pipeline.files import write_json
from fedsca_pipeline.hooks.checks import (
    _check_parameters,
    _is_deployed,
    _refuse_demonstration,
    _refuse_other_models,
    _refuse_unknown_keys,
    _sites,
)
from fedsca_pipeline.hooks.up_to_date import (
    _LAST_RUN,
    _REPORTED,
    _SLICES,
    _WHOLE_RUNS,
    _covered,
    _described_now,
    _raise_if_up_to_date,
    _show_data_report,
    _volume_metrics,
)
from fedsca_pipeline.terminal import show_comparison, show_result
from fedsca_pipeline.tracking.comparison import ComparisonTracker
from fedsca_pipeline.tracking.run import Tracker
from fedsca_pipeline.tracking.writer import TrackingConfig

logger = logging.getLogger(__name__)


class ProjectHooks:
    """The project's hooks; state lives from one command's start to its end."""

    def __init__(self) -> None:
        self._tracker: Tracker | None = None
        self._comparison: ComparisonTracker | None = None
        self._catalog: DataCatalog | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Tell the registry where the raw sites are, and read ``mlflow.yml``."""
        from fedsca_pipeline.pipeline_registry import deployed, raw_folder

        catalog = context.config_loader["catalog"]
        # The loader would read, merge and resolve it again for Kedro.
        context.config_loader["catalog"] = catalog
        raw = catalog["raw_sites"]["path"]
        raw_folder.set(context.project_path / raw)
        deployed.set(_is_deployed(context.config_loader["parameters"]))
        settle_sites(context.project_path / raw)
        writer = (_tracking_config(context), context.project_path, " ".join(["kedro", *sys.argv[1:]]))
        self._tracker, self._comparison = Tracker(*writer), ComparisonTracker(*writer)

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Check what Kedro's typed parameters cannot, and stop here if the run is up to date."""
        self._catalog = catalog
        names = run_params.get("pipeline_names") or ["__default__"]
        whole = [name for name in names if name in _WHOLE_RUNS]
        parameters = catalog.load("parameters")
        _refuse_unknown_keys(parameters)
        if "demo_sites_summary" in pipeline.all_outputs():
            _refuse_demonstration(parameters, catalog)
        check_names(parameters["strategies"])
        description = _described_now(parameters, catalog)
        if whole and description and not any(run_params.get(key) for key in _SLICES) and not parameters["force"]:
            _raise_if_up_to_date(whole[-1], description, catalog)
        if "params:comparison" in pipeline.inputs():
            from fedsca_pipeline.comparison.plan import check_comparison

            check_comparison(parameters, _sites(parameters))
        if "params:strategies" in pipeline.inputs():
            _check_parameters(parameters)
            if description and not parameters["force"]:
                from fedsca_pipeline.federation.run import refuse_another_run

                refuse_another_run(catalog.load("checkpoints"), description)
        elif description and "run_description" in pipeline.inputs():
            _refuse_other_models(description, catalog)

    @hook_impl
    def before_node_run(self, node: Node, catalog: DataCatalog) -> None:
        """Forget the last whole run as soon as something is made that its table would no longer describe.

        Remember that an import was tried, whatever becomes of it.
        """
        if "import_summary" in node.outputs and not catalog.exists("import_summary"):
            catalog.save("import_summary", {})
        if _REPORTED.intersection(node.outputs):
            (catalog.load("reporting") / _LAST_RUN).unlink(missing_ok=True)

    @hook_impl
    def on_node_error(self, error: Exception, catalog: DataCatalog) -> None:
        """Keep the whole list of what a refused import found broken."""
        if isinstance(error, RefusedImportError):
            catalog.save("import_summary", error.found)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Track what was saved; the run's description opens the MLflow run."""
        if self._tracker is None or self._catalog is None or is_parameter(dataset_name):
            return
        if dataset_name.startswith("comparison_"):
            self._track_comparison(dataset_name, data)
            return
        if self._tracker.run_id is None and dataset_name in _OPENERS:
            self._open(data if dataset_name == "run_description" else self._catalog.load("run_description"))
        if self._tracker.run_id is None:
            return
        self._tracker.saved(dataset_name, data, self._filepath(dataset_name))
        if dataset_name == "site_models":
            self._tracker.log_models(self._catalog.load("models"))

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """End the MLflow run and remember what was run, for the next command to find it up to date."""
        if self._tracker is None:
            return
        mlflow = {"run_id": self._tracker.run_id or "", "uri": self._tracker.uri}
        # First: were MLflow to fail, the same command must find something left to do.
        self._tracker.close("FINISHED")
        whole = [name for name in run_params.get("pipeline_names") or ["__default__"] if name in _WHOLE_RUNS]
        if whole and not any(run_params.get(key) for key in _SLICES):
            last = {"pipelines": _covered(whole[-1]), "description": catalog.load("run_description"), "mlflow": mlflow}
            write_json(catalog.load("reporting") / _LAST_RUN, last)
            show_result(catalog.load("final_metrics"), mlflow, _volume_metrics(pipeline, catalog))
        if self._comparison is not None:
            if "comparison_page" in pipeline.outputs():
                table = catalog.load("comparison_table").to_dict("records")
                mlflow = {"run_id": self._comparison.run_id or "", "uri": self._comparison.uri}
                show_comparison(table, str(self._filepath("comparison_page")), mlflow)
            self._comparison.close("FINISHED")
        if "data_report_index" in pipeline.outputs():
            _show_data_report(catalog.load("data_report_index"), self._filepath("data_report_page"))

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        """Mark the MLflow run as failed; it goes on when the command is given again."""
        self._close("FAILED")

    def _open(self, description: Mapping[str, Any]) -> None:
        """Open the MLflow run and give it what preprocessing saved before the fingerprint was known."""
        if self._tracker is None:
            return
        self._tracker.open(description)
        for site in description["data"]:
            self._tracker.saved(f"{site}.report", None, self._filepath(f"{site}.report"))

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
            # Finished in another clone, or while nothing was logged.
            stored = self._catalog.load("comparison_cells")
            for name in data:
                self._comparison.cell(stored[name]())
        self._comparison.saved(dataset_name, self._filepath(dataset_name))

    def interrupted(self) -> None:
        """Mark the MLflow run as killed: Kedro calls no hook on Ctrl-C. Who presses it again does not wait for that."""
        with suppress(KeyboardInterrupt):
            self._close("KILLED")

    def _close(self, status: str) -> None:
        """End the MLflow run; what ended the command must not be hidden by MLflow failing too."""
        for tracker in (self._tracker, self._comparison):
            try:
                if tracker is not None:
                    tracker.close(status)
            except TrackingError as error:
                logger.warning("the MLflow run could not be marked as %s: %s", status, error)

    def _filepath(self, dataset_name: str) -> Path | None:
        dataset = self._catalog.get(dataset_name) if self._catalog is not None else None
        filepath = getattr(dataset, "_filepath", None)
        return Path(filepath) if filepath is not None else None


# Saving one of these needs an MLflow run; they are what a pipeline that logs saves first.
_OPENERS = frozenset(
    {"run_description", "round_metrics", "site_models", "final_metrics", "volume_metrics", "learning_curves"}
)


def _tracking_config(context: KedroContext) -> TrackingConfig:
    try:
        return TrackingConfig.model_validate(context.config_loader["mlflow"])
    except ValidationError as error:
        from fedsca_pipeline.errors import ConfigError

        raise ConfigError(f"mlflow.yml: {error}") from error
