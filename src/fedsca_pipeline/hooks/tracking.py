"""Kedro hooks: find the sites, refuse bad parameters early, skip what is up to date, track the rest."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.io.core import is_parameter
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from pydantic import ValidationError

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES, discover_sites, settle_sites
from fedsca_pipeline.errors import DataError, RefusedImportError, TrackingError
from fedsca_pipeline.federation.strategies import check_names
from fedsca_pipeline.files import read_json, write_json
from fedsca_pipeline.terminal import FinalTable, show_comparison, show_data_report, show_result
from fedsca_pipeline.tracking.comparison import ComparisonTracker
from fedsca_pipeline.tracking.run import Tracker, TrackingConfig

logger = logging.getLogger(__name__)

# Pipelines that end with the table; what a later one needs, an earlier one has not always made.
_WHOLE_RUNS = ("federated_training", "__default__")
_SLICES = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs", "namespaces", "load_versions")
_LAST_RUN = "last_run.json"
# Set for one command by --params, read by the catalog.
_ROOTS = {"data_root", "foundation_root"}


class RunUpToDate(Exception):  # noqa: N818 - it ends a command well
    """Nothing needs to run: tables and ``mlflow`` are those of the run that made what is there."""

    def __init__(self, table: FinalTable, mlflow: Mapping[str, str], volumes: FinalTable | None) -> None:
        super().__init__("up to date")
        self.table, self.mlflow, self.volumes = table, mlflow, volumes


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
            from fedsca_pipeline.pipelines.comparison.nodes import check_comparison

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


# What `last_run.json` vouches for.
_REPORTED = frozenset({"round_metrics", "site_models", "final_metrics", "volume_metrics"})
# Saving one of these needs an MLflow run; they are what a pipeline that logs saves first.
_OPENERS = frozenset(
    {"run_description", "round_metrics", "site_models", "final_metrics", "volume_metrics", "learning_curves"}
)


def _show_data_report(index: Mapping[str, Any], page: Path | None) -> None:
    """Print the sites; the report is whole then, and what cannot train still ends the command with status 1.

    Raises:
        DataError: preprocessing would refuse a site.
    """
    show_data_report(index["sites"], str(page))
    if refused := index["refused"]:
        raise DataError(
            f"{len(refused)} of {len(index['sites'])} sites cannot train under the present parameters: "
            f"{', '.join(refused)}. What is broken, and the cure, is in {page}"
        )


def _tracking_config(context: KedroContext) -> TrackingConfig:
    try:
        return TrackingConfig.model_validate(context.config_loader["mlflow"])
    except ValidationError as error:
        from fedsca_pipeline.errors import ConfigError

        raise ConfigError(f"mlflow.yml: {error}") from error


def _covered(pipeline: str) -> list[str]:
    return list(_WHOLE_RUNS[: _WHOLE_RUNS.index(pipeline) + 1])


def _refuse_unknown_keys(parameters: Mapping[str, Any]) -> None:
    """Refuse a parameter that no pipeline reads; the keys within a group are the typed configuration's to check.

    Raises:
        ConfigError: naming the YAML key.
    """
    from fedsca_pipeline.errors import ConfigError

    read = {
        name.removeprefix("params:")
        for pipeline in ("__default__", "comparison", "import_sites", "data_report")
        for name in pipelines[pipeline].inputs()
        if is_parameter(name)
    }
    known = read | _ROOTS
    for key in parameters:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"{key} is no parameter{hint} there are: {', '.join(sorted(known - {'parameters'}))}")


def _refuse_demonstration(parameters: Mapping[str, Any], catalog: DataCatalog) -> None:
    """Refuse to go on with the demonstration alone where the user has meant to import data.

    Raises:
        DataError: what points to that, and what to do.
    """
    raw = catalog.load("raw_sites")
    if parameters["demo_sites"].anyway or set(discover_sites(raw)) - set(DEMO_SITES):
        return
    set_ = [key for key in ("importer", "source") if parameters[key] is not None]
    tried = catalog.exists("import_summary")
    if set_ or tried:
        why = f"{' and '.join(set_)} set" if set_ else "an import was tried"
        raise DataError(
            f"{raw}: no site of your own, though {why}; import with kedro run --pipeline=import_sites, or put site "
            "folders there (docs/data.md). To use the demonstration sites all the same: --params=demo_sites.anyway=true"
        )


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    """Build the strategy once, so that a bad option fails before any work.

    Raises:
        ConfigError: naming the YAML key.
    """
    from fedsca_pipeline.errors import ConfigError
    from fedsca_pipeline.federation.strategies import build_strategy, check_options

    federation, sites = parameters["federation"], _sites(parameters)
    strategy = build_strategy(federation.strategy, parameters["strategies"].get(federation.strategy) or {})
    strategy.check_use(parameters["adapters"].method)
    if strategy.pools and _is_deployed(parameters):
        raise ConfigError(f"federation.strategy: {strategy.name} pools images, and those of a deployed site stay there")
    check_options(parameters["strategies"])
    named = {
        "federation.inject_failures": federation.inject_failures,
        "preprocessing.split.overrides": parameters["preprocessing"].split.overrides,
    }
    for key, value in named.items():
        if unknown := sorted(set(value) - set(sites)):
            raise ConfigError(f"{key}: no such site: {', '.join(unknown)}; there are {', '.join(sites)}")
    if not strategy.pools and federation.quorum > (drawn := federation.drawn(len(sites))):
        raise ConfigError(
            f"federation.quorum: {federation.quorum}, but only {drawn} of {len(sites)} sites are drawn in a round; "
            "lower it, or raise federation.participation"
        )
    if len(sites) == 1:
        logger.warning("only one site, %s: this is local training, nothing is federated", sites[0])


def _is_deployed(parameters: Mapping[str, Any]) -> bool:
    """Tell whether the sites are on other machines, by parameters as models or as raw YAML."""
    federation = parameters.get("federation") or {}
    fleet = federation.get("fleet") if isinstance(federation, Mapping) else federation.fleet
    return fleet == "flower"


def _sites(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    if _is_deployed(parameters):
        flower = parameters["flower"]
        return tuple(flower["sites"] if isinstance(flower, Mapping) else flower.sites)
    from fedsca_pipeline.pipeline_registry import raw_folder

    raw = raw_folder.get()
    return (discover_sites(raw) if raw else ()) or DEMO_SITES


def _refuse_other_models(description: Mapping[str, Any], catalog: DataCatalog) -> None:
    """Refuse to score models under parameters, or on data, that are not theirs.

    Raises:
        ResumeError: saying what changed.
    """
    from fedsca_pipeline.errors import ResumeError
    from fedsca_pipeline.federation.run import changes

    if catalog.exists("run_description") and (changed := changes(catalog.load("run_description"), description)):
        raise ResumeError(
            "the models were trained under another configuration, data or code. What changed:\n  "
            + "\n  ".join(changed)
            + "\nPut it back, or train with 'kedro run --pipeline=federated_training'."
        )


def _raise_if_up_to_date(pipeline: str, description: Mapping[str, Any], catalog: DataCatalog) -> None:
    last_run = catalog.load("reporting") / _LAST_RUN
    if not last_run.is_file() or not all(_is_on_disk(name, catalog) for name in pipelines[pipeline].all_outputs()):
        return
    last, index, models = read_json(last_run), catalog.load("site_models"), catalog.load("models")
    made_by = {last["description"]["fingerprint"], catalog.load("run_description")["fingerprint"], index["fingerprint"]}
    trained = [site for site, kept in index["sites"].items() if "best" in kept]
    if (
        pipeline in last["pipelines"]
        and made_by == {description["fingerprint"]}
        and all((models / site / "site_model.json").is_file() for site in trained)
    ):
        volumes = _volume_metrics(pipelines[pipeline], catalog)
        raise RunUpToDate(catalog.load("final_metrics"), last["mlflow"], volumes)


def _volume_metrics(pipeline: Pipeline, catalog: DataCatalog) -> FinalTable | None:
    """What ``volume_metrics`` holds, if any site has volumes."""
    return catalog.load("volume_metrics") if "volume_metrics" in pipeline.outputs() else None


def _is_on_disk(name: str, catalog: DataCatalog) -> bool:
    """Look for a file by its catalog entry: making its dataset would import pandas and plotly to no purpose."""
    filepath = catalog.config_resolver.resolve_pattern(name).get("filepath")
    return Path(filepath).is_file() if filepath else catalog.exists(name)


def _described_now(parameters: Mapping[str, Any], catalog: DataCatalog) -> dict[str, Any] | None:
    """Describe the run that would start now; None where what it needs has not been prepared yet."""
    if _is_deployed(parameters):
        # The sites alone know which data they have; the pipeline asks them first.
        return None
    sites = _sites(parameters)
    if not all(catalog.exists(name) for name in ("foundation_provenance", *(f"{site}.report" for site in sites))):
        return None
    from fedsca_pipeline.data.site_folder.discovery import fingerprint_site
    from fedsca_pipeline.federation.run import describe_run
    from fedsca_pipeline.pipelines.federated_training.nodes import configuration_of, data_version, threads_of

    raw = catalog.load("raw_sites")
    configuration = configuration_of(parameters)
    return describe_run(
        configuration,
        {site: data_version(fingerprint_site(raw, site), catalog.load(f"{site}.report")) for site in sites},
        _foundation_hash(FoundationConfig(**configuration["foundation"]), catalog),
        threads_of(parameters, len(sites)),
    )


def _foundation_hash(foundation: FoundationConfig, catalog: DataCatalog) -> str:
    """The weights' hash: of a local folder as it is now, else as the foundation was fetched."""
    if foundation.source and Path(foundation.source).is_dir():
        from fedsca_pipeline.model.foundation import prepare_foundation

        return prepare_foundation(foundation, catalog.load("foundations")).sha256
    return catalog.load("foundation_provenance")["sha256"]
