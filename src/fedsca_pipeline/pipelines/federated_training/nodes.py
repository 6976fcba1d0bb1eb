"""Nodes of federated training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import (
    AdaptersConfig,
    EvaluationConfig,
    FederationConfig,
    FoundationConfig,
    PreprocessingConfig,
    RunConfig,
    TrainingConfig,
)
from fedsca_pipeline.federation.export import write_site_models
from fedsca_pipeline.federation.fleets.registry import FLEETS, open_fleet, site_threads
from fedsca_pipeline.federation.run import (
    configuration_of,
    data_version,
    describe_run,
    open_run,
    threads_of,
)
from fedsca_pipeline.model.adapters.attach import build_trainable, start_values
from fedsca_pipeline.pipelines.progress.rounds import serve

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fedsca_pipeline.federation.fleets.data import SiteData


def describe(parameters: Mapping[str, Any], foundation_provenance: Mapping[str, Any], *reports: dict) -> dict[str, Any]:
    """Return the run's description with its fingerprint: configuration, data, foundation, code and threads."""
    return describe_run(
        configuration_of(parameters),
        {report["site"]: data_version(report["fingerprint"], report) for report in reports},
        foundation_provenance["sha256"],
        threads_of(parameters, len(reports)),
    )


def train(
    description: dict[str, Any],
    force: bool,
    run: RunConfig,
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    adapters: AdaptersConfig,
    training: TrainingConfig,
    federation: FederationConfig,
    strategies: dict[str, dict[str, Any]],
    evaluation: EvaluationConfig,
    foundations: Path,
    checkpoints: Path,
    private_sites: Path,
    *site_inputs: Any,
) -> Iterator[dict[str, Any]]:
    """Run the federated rounds, or what is left of them, yielding each round's record as it is done.

    ``site_inputs`` alternate manifest and arrays, a pair a site.
    """
    FLEETS[federation.fleet].start_early()
    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.federation.fleets.data import PooledData
    from fedsca_pipeline.federation.fleets.in_process import LocalSites
    from fedsca_pipeline.federation.site.steps import LocalSettings
    from fedsca_pipeline.federation.strategies import build_strategy
    from fedsca_pipeline.pipelines.progress.rounds import RoundProgress

    folder = open_run(checkpoints, description, force=force)
    data = _site_data(site_inputs)
    threads = site_threads(run, federation, len(data))
    with deterministic(run, threads) as device:
        strategy = build_strategy(federation.strategy, strategies.get(federation.strategy) or {})
        strategy.check_use(adapters.method)
        model, layout = build_trainable(foundation, adapters, foundations, preprocessing)
        if strategy.pools:
            training, federation, data = training.times(len(data)), federation.pooled(), PooledData(data)
        start = start_values(model, strategy.shared(layout))
        settings = LocalSettings(
            run=folder.fingerprint,
            seed=run.seed,
            classes=preprocessing.classes,
            wire_dtype=federation.wire_dtype,
            evaluation_batch=evaluation.batch_size,
            threshold=evaluation.threshold,
            training=training,
            cache_bytes=int(training.feature_cache * 2**30 / len(data)),
            compression=federation.compression,
            validate_every=evaluation.every,
            validate_after_training=evaluation.after_training,
            rounds=federation.rounds,
        )
        here = LocalSites(model, layout, strategy, settings, data, folder.sites, device, threads, private_sites)
        with (
            folder.scratch(),
            RoundProgress(tuple(data), federation.rounds) as progress,
            open_fleet(federation, here, progress.step) as fleet,
        ):
            yield from serve(fleet, progress, strategy, layout, start, federation, run, folder)


def export_site_models(
    description: dict[str, Any],
    round_metrics: Any,
    run: RunConfig,
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    adapters: AdaptersConfig,
    federation: FederationConfig,
    strategies: dict[str, dict[str, Any]],
    evaluation: EvaluationConfig,
    foundations: Path,
    checkpoints: Path,
    models: Path,
    *manifests: Any,
) -> dict[str, Any]:
    """Write every site's model that validation chose, its last one below it, and the general model.

    Returns what was written, by site.
    """
    from fedsca_pipeline.federation.strategies import build_strategy

    model, layout = build_trainable(foundation, adapters, foundations, preprocessing)
    strategy = build_strategy(federation.strategy, strategies.get(federation.strategy) or {})
    start = start_values(model, strategy.trained(layout))
    return write_site_models(
        model, layout, start, strategy, description, run, preprocessing, foundation, federation, evaluation,
        foundations, checkpoints, models, *manifests,
    )  # fmt: skip


def _site_data(site_inputs: tuple[Any, ...]) -> SiteData:
    from fedsca_pipeline.federation.fleets.data import SiteData

    pairs = zip(site_inputs[::2], site_inputs[1::2], strict=True)
    return SiteData({str(manifest["site"].iloc[0]): (path, manifest) for manifest, path in pairs})
