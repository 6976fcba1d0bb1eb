"""The hook that remembers the last whole run and prints its result; a run that is up to date is not started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from fedsca_pipeline.config import FoundationConfig, Settings
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.files import read_json, write_json
from fedsca_pipeline.hooks.slices import SLICES
from fedsca_pipeline.hooks.tracking import TrackingHooks, filepath_of
from fedsca_pipeline.terminal import FinalTable, show_comparison, show_data_report, show_result

# Pipelines that end with the final table. Each makes all that those before it make.
_WHOLE_RUNS = ("federated_training", "__default__")
_LAST_RUN = "last_run.json"
# Data sets that `last_run.json` vouches for.
_REPORTED = frozenset({"round_metrics", "site_models", "final_metrics", "volume_metrics"})


class RunUpToDate(Exception):  # noqa: N818 - it ends a command well
    """Nothing needs to run. The tables and ``mlflow`` are those of the run that made what is there."""

    def __init__(self, table: FinalTable, mlflow: Mapping[str, str], volumes: FinalTable | None) -> None:
        super().__init__("up to date")
        self.table, self.mlflow, self.volumes = table, mlflow, volumes


class UpToDateHooks:
    """Remembers the last whole run in ``last_run.json``, and prints the result of a command.

    Args:
        tracking: names the MLflow runs of the command, which it has closed by then.
    """

    def __init__(self, tracking: TrackingHooks) -> None:
        self._tracking = tracking

    @hook_impl
    def before_node_run(self, node: Node, catalog: DataCatalog) -> None:
        """Forget the last whole run as soon as a node changes what it describes."""
        if _REPORTED.intersection(node.outputs):
            (catalog.load("reporting") / _LAST_RUN).unlink(missing_ok=True)

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Remember the run, so that the next command finds it up to date, and print its result.

        Raises:
            DataError: the data report lists sites that cannot train.
        """
        if is_whole_run(run_params):
            mlflow = self._tracking.mlflow
            covered = list(_WHOLE_RUNS[: _WHOLE_RUNS.index(_whole_pipelines(run_params)[-1]) + 1])
            last = {"pipelines": covered, "description": catalog.load("run_description"), "mlflow": mlflow}
            write_json(catalog.load("reporting") / _LAST_RUN, last)
            show_result(catalog.load("final_metrics"), mlflow, _volume_metrics(pipeline, catalog))
        if "comparison_page" in pipeline.outputs():
            table = catalog.load("comparison_table").to_dict("records")
            show_comparison(table, str(filepath_of("comparison_page", catalog)), self._tracking.comparison_mlflow)
        if "data_report_index" in pipeline.outputs():
            _show_data_report(catalog.load("data_report_index"), filepath_of("data_report_page", catalog))


def is_whole_run(run_params: Mapping[str, Any]) -> bool:
    """Return whether a command runs a whole pipeline that ends with the final table, not a slice of it."""
    return bool(_whole_pipelines(run_params)) and not any(run_params.get(key) for key in SLICES)


def raise_if_up_to_date(run_params: Mapping[str, Any], description: Mapping[str, Any], catalog: DataCatalog) -> None:
    """Check that something is left to do.

    Raises:
        RunUpToDate: the described run has been done, and all that it made is there.
    """
    pipeline = _whole_pipelines(run_params)[-1]
    last_run = catalog.load("reporting") / _LAST_RUN
    if not last_run.is_file() or not all(_is_on_disk(name, catalog) for name in pipelines[pipeline].all_outputs()):
        return
    last, index, models = read_json(last_run), catalog.load("site_models"), catalog.load("models")
    made_by = {last["description"]["fingerprint"], catalog.load("run_description")["fingerprint"], index["fingerprint"]}
    trained = [site for site, written in index["sites"].items() if "best" in written]
    if (
        pipeline in last["pipelines"]
        and made_by == {description["fingerprint"]}
        and all((models / site / "site_model.json").is_file() for site in trained)
    ):
        volumes = _volume_metrics(pipelines[pipeline], catalog)
        raise RunUpToDate(catalog.load("final_metrics"), last["mlflow"], volumes)


def describe_now(settings: Settings, sites: Sequence[str], catalog: DataCatalog) -> dict[str, Any] | None:
    """Return the description of the run that would start now, or None if its data are not prepared yet."""
    if not all(catalog.exists(name) for name in ("foundation_provenance", *(f"{site}.report" for site in sites))):
        return None
    from fedsca_pipeline.data.site_folder.discovery import fingerprint_site
    from fedsca_pipeline.federation.run import configuration_of, data_version, describe_run, threads_of

    raw = catalog.load("raw_sites")
    return describe_run(
        configuration_of(settings),
        {site: data_version(fingerprint_site(raw, site), catalog.load(f"{site}.report")) for site in sites},
        _foundation_hash(settings.foundation, catalog),
        threads_of(settings, len(sites)),
    )


def _whole_pipelines(run_params: Mapping[str, Any]) -> list[str]:
    return [name for name in run_params.get("pipeline_names") or ["__default__"] if name in _WHOLE_RUNS]


def _volume_metrics(pipeline: Pipeline, catalog: DataCatalog) -> FinalTable | None:
    return catalog.load("volume_metrics") if "volume_metrics" in pipeline.outputs() else None


def _is_on_disk(name: str, catalog: DataCatalog) -> bool:
    """Return whether a data set's file exists, by its catalog entry: making the data set would import pandas."""
    filepath = catalog.config_resolver.resolve_pattern(name).get("filepath")
    return Path(filepath).is_file() if filepath else catalog.exists(name)


def _foundation_hash(foundation: FoundationConfig, catalog: DataCatalog) -> str:
    """Return the weights' SHA-256: of a local folder as it is now, else as the foundation was fetched."""
    if foundation.source and Path(foundation.source).is_dir():
        from fedsca_pipeline.model.foundation import prepare_foundation

        return prepare_foundation(foundation, catalog.load("foundations")).sha256
    return catalog.load("foundation_provenance")["sha256"]


def _show_data_report(index: Mapping[str, Any], page: Path | None) -> None:
    """Print the sites. The report is whole by then, and sites that cannot train still end the command with status 1.

    Raises:
        DataError: preprocessing would refuse a site.
    """
    show_data_report(index["sites"], str(page))
    if refused := index["refused"]:
        raise DataError(
            f"{len(refused)} of {len(index['sites'])} sites cannot train under the present parameters: "
            f"{', '.join(refused)}. What is broken, and the cure, is in {page}"
        )
