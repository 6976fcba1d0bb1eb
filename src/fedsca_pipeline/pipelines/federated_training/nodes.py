"""Nodes of federated training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import Settings
from fedsca_pipeline.federation.fleets.registry import FLEETS, open_fleet
from fedsca_pipeline.federation.run import (
    RunFolder,
    configuration_of,
    data_version,
    describe_run,
    open_run,
    shorter_run,
    threads_of,
)


def describe(settings: Settings, foundation_provenance: Mapping[str, Any], *reports: dict[str, Any]) -> dict[str, Any]:
    """Return the run's description with its fingerprint: configuration, data, foundation, code and threads."""
    return describe_run(
        configuration_of(settings),
        {report["site"]: data_version(report["fingerprint"], report) for report in reports},
        foundation_provenance["sha256"],
        threads_of(settings, len(reports)),
    )


def train(
    settings: Settings,
    description: dict[str, Any],
    force: bool,
    foundations: Path,
    checkpoints: Path,
    private_sites: Path,
    *site_inputs: Any,
) -> Iterator[dict[str, Any]]:
    """Run the rounds that are left, and yield each round's record as soon as it is done.

    A finished run that differs in fewer ``federation.rounds`` only is gone on with.

    ``site_inputs`` alternate manifest and arrays, one pair per site.
    """
    FLEETS[settings.federation.fleet].start_early()
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.federation.fleets.data import PooledData, SiteData
    from fedsca_pipeline.federation.fleets.in_process import LocalSites
    from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
    from fedsca_pipeline.federation.setup import set_up
    from fedsca_pipeline.model.adapters.attach import start_values
    from fedsca_pipeline.pipelines.progress.rounds import RoundProgress, serve

    shorter = None if force else shorter_run(checkpoints, description)
    if shorter is not None:
        own, (earlier, rounds) = RunFolder(checkpoints, description["fingerprint"]), shorter
        finished = CheckpointFolder(earlier.server, earlier.fingerprint, earlier.sites)
        CheckpointFolder(own.server, own.fingerprint, own.sites).prolong(finished, rounds)
    folder = open_run(checkpoints, description, force=force)
    data = SiteData.of(site_inputs[::2], site_inputs[1::2])
    threads = threads_of(settings, len(data))
    with deterministic(settings.run, threads) as device:
        setup = set_up(settings, foundations, run=folder.fingerprint, sites=len(data))
        start = start_values(setup.model, setup.strategy.shared())
        sites = LocalSites(
            setup.model,
            setup.strategy,
            setup.local,
            PooledData(data) if setup.strategy.pools else data,
            folder.sites,
            device,
            threads,
            private_sites,
        )
        with (
            folder.scratch(),
            RoundProgress(tuple(sites.data), settings.federation.rounds) as progress,
            open_fleet(setup.settings.federation, sites, progress.step) as fleet,
        ):
            yield from serve(fleet, progress, setup, start, folder)


def export_site_models(
    settings: Settings,
    description: dict[str, Any],
    round_metrics: Any,
    foundations: Path,
    checkpoints: Path,
    models: Path,
    *manifests: Any,
) -> dict[str, Any]:
    """Write each site's model that validation chose, its last one and the general model; return an index by site."""
    from fedsca_pipeline.federation.export import write_site_models
    from fedsca_pipeline.federation.setup import set_up
    from fedsca_pipeline.model.adapters.attach import start_values

    setup = set_up(settings, foundations, run=description["fingerprint"], sites=len(description["data"]))
    start = start_values(setup.model, setup.strategy.trained())
    return write_site_models(setup, start, description, manifests, foundations, checkpoints, models)
