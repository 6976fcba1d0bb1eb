"""Checks of parameters before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.io.core import is_parameter

from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES, discover_sites
from fedsca_pipeline.errors import DataError

logger = logging.getLogger(__name__)


# Set for one command by --params, read by the catalog.
_ROOTS = {"data_root", "foundation_root"}


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
