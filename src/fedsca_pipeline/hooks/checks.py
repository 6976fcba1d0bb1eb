"""The hook that reads and checks the parameters, before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from pydantic import ValidationError

from fedsca_pipeline.config import Parameters, read_parameters
from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES, SITES_READY, discover_sites, place_finished_sites
from fedsca_pipeline.errors import ConfigError, DataError, FedscaError, ResumeError, faults_by_key
from fedsca_pipeline.federation.strategies import check_names
from fedsca_pipeline.files import LockHeld, open_locked, remove_partial_files
from fedsca_pipeline.forget import kept_sites
from fedsca_pipeline.hooks.root_lock import LOCK_FILE, RootLock
from fedsca_pipeline.hooks.slices import check_runner, check_slices
from fedsca_pipeline.hooks.up_to_date import describe_now, is_whole_run, raise_if_up_to_date

logger = logging.getLogger(__name__)

# Data sets that only training makes.
_TRAINED = frozenset({"round_metrics", "site_models"})


class ParameterHooks:
    """Validates the parameters once, hands them to the nodes as ``settings``, and refuses a run that cannot work.

    Args:
        lock: taken as soon as a run is found fit to write.
    """

    def __init__(self, lock: RootLock) -> None:
        self._lock = lock

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read the parameters, and have the pipelines made anew, for the raw sites that are there now.

        Raises:
            ConfigError: one line per fault, each with its YAML key.
        """
        from fedsca_pipeline import pipeline_registry

        parameters = context.config_loader["parameters"]
        self._parameters = read_parameters(parameters)
        _check_flower(self._parameters.flower)
        catalog = context.config_loader["catalog"]
        # Stored back: the loader would read, merge and resolve both again for Kedro.
        context.config_loader["parameters"], context.config_loader["catalog"] = parameters, catalog
        raw = context.project_path / catalog["raw_sites"]["path"]
        pipeline_registry.raw_folder.set(raw)
        pipeline_registry.deployed.set(_is_deployed(self._parameters))
        if (raw / SITES_READY).is_dir():
            # A command that holds the lock moves them itself.
            with suppress(LockHeld), open_locked(context.project_path / catalog["data_root"]["path"] / LOCK_FILE):
                place_finished_sites(raw)
        # Kedro keeps the pipelines of the process's first session, whatever data the next one has.
        pipelines.configure(pipeline_registry.__name__)

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Add the data set ``settings``, from which nodes take their parameter groups."""
        catalog["settings"] = MemoryDataset(self._parameters.settings, copy_mode="assign")

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Check what the types cannot, stop here if the run is up to date, and lock the data root.

        Raises:
            ConfigError: what cannot work, before anything runs.
            UnavailableError: another command writes to the data root.
        """
        check_slices(run_params.get("pipeline_names"), run_params)
        check_runner(str(run_params.get("runner")), pipeline)
        parameters = self._parameters
        settings, sites = parameters.settings, _sites(parameters)
        if "demo_sites_summary" in pipeline.all_outputs():
            _refuse_demonstration(parameters, catalog)
        check_names(settings.strategies)
        # Only the sites of a deployed run know their data. The pipeline asks them first.
        description = None if _is_deployed(parameters) else describe_now(settings, sites, catalog)
        if description and is_whole_run(run_params) and not parameters.force:
            raise_if_up_to_date(run_params, description, catalog)
        if "params:comparison" in pipeline.inputs() and parameters.comparison:
            from fedsca_pipeline.comparison.plan import check_comparison

            check_comparison(settings, parameters.comparison, sites)
        trains = bool(_TRAINED & pipeline.all_outputs())
        if trains:
            _check_training(parameters, sites)
        root = catalog.load("data_root")
        self._lock.take(root)
        if "demo_sites_summary" in pipeline.all_outputs() or trains:
            _name_gone_sites(root, sites)
        try:
            _refuse_other_run(description, parameters.force, catalog, pipeline, trains=trains)
        except FedscaError:
            self._lock.release()
            raise
        # No other command writes here now. Commands on other data roots share the foundations.
        for layer in root.glob("0[2-8]_*/"):
            remove_partial_files(layer, but="_foundations")


def _check_flower(flower: Mapping[str, Any] | None) -> None:
    """Check the group ``flower``, which only a deployed federation has.

    Raises:
        ConfigError: one line per fault, each with its YAML key.
    """
    if flower is None:
        return
    from fedsca_pipeline.flower.config import FlowerConfig

    try:
        FlowerConfig.model_validate(flower)
    except ValidationError as error:
        raise ConfigError("\n".join(faults_by_key(error, "flower"))) from error


def _refuse_demonstration(parameters: Parameters, catalog: DataCatalog) -> None:
    """Refuse to train on the demonstration sites alone if the user meant to import data.

    Raises:
        DataError: why an import was expected, and the cure.
    """
    raw = catalog.load("raw_sites")
    if parameters.demo_sites.anyway or set(discover_sites(raw)) - set(DEMO_SITES):
        return
    given = [key for key in ("importer", "source") if getattr(parameters, key) is not None]
    if given or catalog.exists("import_summary"):
        why = f"{' and '.join(given)} set" if given else "an import was tried"
        raise DataError(
            f"{raw}: no site of your own, though {why}; import with kedro run --pipeline=import_sites, or put site "
            "folders there (docs/data.md). To use the demonstration sites all the same: --params=demo_sites.anyway=true"
        )


def _check_training(parameters: Parameters, sites: tuple[str, ...]) -> None:
    """Check the strategy and its options before any work.

    Raises:
        ConfigError: naming the YAML key.
    """
    from fedsca_pipeline.federation.strategies import check_options, strategy_class, strategy_options

    settings = parameters.settings
    federation = settings.federation
    strategy = strategy_class(federation.strategy)
    options = strategy_options(federation.strategy, settings.strategy_options)
    strategy.check_use(options, settings.adapters.method)
    if strategy.pools and _is_deployed(parameters):
        raise ConfigError(f"federation.strategy: {strategy.name} pools images, and those of a deployed site stay there")
    check_options(settings.strategies)
    named: dict[str, Iterable[str]] = {
        "federation.inject_failures": federation.inject_failures,
        "preprocessing.split.overrides": settings.preprocessing.split.overrides,
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


def _is_deployed(parameters: Parameters) -> bool:
    return parameters.federation.fleet == "flower"


def _sites(parameters: Parameters) -> tuple[str, ...]:
    if _is_deployed(parameters) and parameters.flower:
        return tuple(parameters.flower["sites"])
    from fedsca_pipeline.pipeline_registry import raw_folder

    raw = raw_folder.get()
    return (discover_sites(raw) if raw else ()) or DEMO_SITES


def _name_gone_sites(root: Path, sites: tuple[str, ...]) -> None:
    if gone := sorted(kept_sites(root) - set(sites)):
        logger.warning(
            "%s: models, arrays or scores of sites that are gone are still there: %s; if they must not stay, delete "
            "all that is kept of each: kedro run --pipeline=forget_site --params=site=%s",
            root,
            ", ".join(gone),
            gone[0],
        )


def _refuse_other_run(
    description: Mapping[str, Any] | None, force: bool, catalog: DataCatalog, pipeline: Pipeline, *, trains: bool
) -> None:
    """Refuse what does not fit to what an earlier command left, which is final only while no other command runs.

    Raises:
        ResumeError: naming what changed.
    """
    if trains and description and not force:
        from fedsca_pipeline.federation.run import refuse_another_run

        refuse_another_run(catalog.load("checkpoints"), description)
    elif not trains and description and "run_description" in pipeline.inputs():
        _refuse_other_models(description, catalog)


def _refuse_other_models(description: Mapping[str, Any], catalog: DataCatalog) -> None:
    """Refuse to score models under parameters, or on data, other than their own.

    Raises:
        ResumeError: naming what changed.
    """
    from fedsca_pipeline.federation.run import changes

    if catalog.exists("run_description") and (changed := changes(catalog.load("run_description"), description)):
        raise ResumeError(
            "the models were trained under another configuration, data or code. What changed:\n  "
            + "\n  ".join(changed)
            + "\nPut it back, or train with 'kedro run --pipeline=federated_training'."
        )
