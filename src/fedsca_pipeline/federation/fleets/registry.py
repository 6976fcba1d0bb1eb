"""The fleets by name, and the cores each uses; a fleet's module is imported when the fleet is opened."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from fedsca_pipeline.config import FederationConfig, RunConfig
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.fleets import forkserver

if TYPE_CHECKING:
    from fedsca_pipeline.federation.fleets.fleet import Fleet
    from fedsca_pipeline.federation.fleets.in_process import LocalSites
    from fedsca_pipeline.federation.site.steps import StepCallback

    Opener = Callable[[FederationConfig, LocalSites, StepCallback], AbstractContextManager[Fleet]]


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    # macOS and Windows have no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_at_once(_federation: FederationConfig, _sites: int) -> int:
    return 1


def _workers_at_once(federation: FederationConfig, sites: int) -> int:
    return min(federation.workers or available_cores(), federation.drawn(sites))


def _prepare_nothing() -> None:
    """Start no process: only the fleet ``processes`` starts anything before it is opened."""


@dataclass(frozen=True)
class FleetKind:
    """One fleet: how many sites it trains at once, what it starts early, and the function that opens it."""

    at_once: Callable[[FederationConfig, int], int]
    start_early: Callable[[], None]
    opener: str


FLEETS: Mapping[str, FleetKind] = MappingProxyType(
    {
        "in_process": FleetKind(_one_at_once, _prepare_nothing, "in_process:open_in_process"),
        "processes": FleetKind(_workers_at_once, forkserver.start, "processes:open_processes"),
        "flower": FleetKind(_one_at_once, _prepare_nothing, "registry:refuse_local_sites"),
    }
)
"""``federation.fleet`` to its kind; ``opener`` is ``module:function`` in this package."""


def refuse_local_sites(_config: FederationConfig, _sites: LocalSites, _on_step: StepCallback) -> NoReturn:
    """Refuse sites on this machine: those of a deployed federation are on other machines (docs/deployment.md).

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "federation.fleet: flower trains at hospitals, with --pipeline=federated_training; for sites on this machine "
        "set it to in_process or processes"
    )


def site_threads(run: RunConfig, federation: FederationConfig, sites: int) -> int:
    """Return the number of torch threads that *one* site trains with: ``run.threads``, or its share of the cores.

    Threads change the order of sums, and so a run's numbers; nothing else about a fleet does.

    Args:
        run: its ``threads``, if set, are used as they are.
        federation: the fleet, and how many sites work at once.
        sites: number of sites in the run.
    """
    return run.threads or max(1, available_cores() // FLEETS[federation.fleet].at_once(federation, sites))


def open_fleet(config: FederationConfig, sites: LocalSites, on_step: StepCallback) -> AbstractContextManager[Fleet]:
    """Return the configured fleet over the sites on this machine, as a context; leaving it ends its workers.

    Raises:
        ConfigError: a configured device does not exist.
    """
    module, _, function = FLEETS[config.fleet].opener.partition(":")
    opener: Opener = getattr(importlib.import_module(f"fedsca_pipeline.federation.fleets.{module}"), function)
    return opener(config, sites, on_step)
