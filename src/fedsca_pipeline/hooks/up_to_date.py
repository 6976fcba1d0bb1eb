"""Whether the run that would start is already there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline

from fedsca_pipeline.config import FoundationConfig
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.files import read_json
from fedsca_pipeline.hooks.checks import (
    _is_deployed,
    _sites,
)
from fedsca_pipeline.terminal import FinalTable, show_data_report

# Pipelines that end with the table; what a later one needs, an earlier one has not always made.
_WHOLE_RUNS = ("federated_training", "__default__")


_SLICES = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs", "namespaces", "load_versions")


_LAST_RUN = "last_run.json"


class RunUpToDate(Exception):  # noqa: N818 - it ends a command well
    """Nothing needs to run: tables and ``mlflow`` are those of the run that made what is there."""

    def __init__(self, table: FinalTable, mlflow: Mapping[str, str], volumes: FinalTable | None) -> None:
        super().__init__("up to date")
        self.table, self.mlflow, self.volumes = table, mlflow, volumes


# What `last_run.json` vouches for.
_REPORTED = frozenset({"round_metrics", "site_models", "final_metrics", "volume_metrics"})


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


def _covered(pipeline: str) -> list[str]:
    return list(_WHOLE_RUNS[: _WHOLE_RUNS.index(pipeline) + 1])


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
    from fedsca_pipeline.federation.run import configuration_of, data_version, describe_run, threads_of

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
