"""Nodes of federated training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
from fedsca_pipeline.federation.fleets.registry import FLEETS, open_fleet, site_threads
from fedsca_pipeline.federation.run import CHANGES_NO_NUMBER, CONFIGURATION, describe_run, finish_run, open_run

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import Tensor

    from fedsca_pipeline.federation.fleets.fleet import Fleet, SiteData
    from fedsca_pipeline.federation.messages.codec import TensorLayout
    from fedsca_pipeline.federation.run import RunFolder
    from fedsca_pipeline.federation.strategies.base import Strategy
    from fedsca_pipeline.model.foundation.model import SegmentationModel
    from fedsca_pipeline.pipelines.progress.rounds import RoundProgress

GENERAL_NOTE = (
    "General model (docs/method.md): the mean of all sites' shared tensors beside the foundation's own decoder and "
    "high adapters. Alone it is not a usable segmenter; tune its private tensors on labelled images first."
)


def describe(parameters: Mapping[str, Any], foundation_provenance: Mapping[str, Any], *reports: dict) -> dict[str, Any]:
    """Return the run's description with its fingerprint: configuration, data, foundation, code and threads."""
    return describe_run(
        configuration_of(parameters),
        {report["site"]: data_version(report["fingerprint"], report) for report in reports},
        foundation_provenance["sha256"],
        threads_of(parameters, len(reports)),
    )


def threads_of(parameters: Mapping[str, Any], sites: int) -> int:
    """Return the torch threads that one of ``sites`` trains with, given models or raw YAML."""
    run, federation = (
        model.model_validate(parameters[key]) for key, model in (("run", RunConfig), ("federation", FederationConfig))
    )
    return site_threads(run, federation, sites)


def data_version(raw_fingerprint: str, report: Mapping[str, Any]) -> str:
    """Return what identifies a site's data: its raw folder, and the split drawn of it, which may be older."""
    return f"{raw_fingerprint}-{report['split']['fingerprint']}"


def configuration_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of every parameter that decides a run's numbers, given as models or as raw YAML.

    Kedro makes models only of the groups that the running pipeline's nodes read.
    """
    values = {
        key: model.model_validate(parameters[key]).model_dump(mode="json") for key, model in CONFIGURATION.items()
    }
    strategy = values["federation"]["strategy"]
    values["federation"] = {k: value for k, value in values["federation"].items() if k not in CHANGES_NO_NUMBER}
    return {**values, "strategies": {strategy: parameters["strategies"].get(strategy) or {}}}


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
    from fedsca_pipeline.federation.fleets.fleet import LocalSites, PooledData
    from fedsca_pipeline.federation.site.worker import LocalSettings
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


def serve(
    fleet: Fleet,
    progress: RoundProgress,
    strategy: Strategy,
    layout: TensorLayout,
    start: Mapping[str, Tensor],
    federation: FederationConfig,
    run: RunConfig,
    folder: RunFolder,
    samples: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """Be the server of a run over an open fleet; yield each round's record by its place in ``round_metrics``.

    ``samples`` are the sites' training images, where they are known.
    """
    from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
    from fedsca_pipeline.federation.server.rounds import Server

    server = Server(
        fleet,
        strategy,
        layout,
        start,
        federation,
        run=folder.fingerprint,
        seed=run.seed,
        folder=CheckpointFolder(folder.server),
        samples=samples,
    )
    for record in server.rounds():
        progress.round_done(record)
        yield {f"{folder.fingerprint}/round_{record.round:05d}": record.as_json()}


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


def write_site_models(
    model: SegmentationModel,
    layout: TensorLayout,
    start: Mapping[str, Tensor],
    strategy: Strategy,
    description: Mapping[str, Any],
    run: RunConfig,
    preprocessing: PreprocessingConfig,
    foundation: FoundationConfig,
    federation: FederationConfig,
    evaluation: EvaluationConfig,
    foundations: Path,
    checkpoints: Path,
    models: Path,
    *manifests: Any,
) -> dict[str, Any]:
    """Write the models of a run by way of a network in memory; as ``export_site_models``.

    ``model`` may have been trained: all that ``strategy`` trains is written over. ``start`` is what that was in the
    beginning.
    """
    from fedsca_pipeline.data.arrays import known_in
    from fedsca_pipeline.federation.fleets.fleet import POOLED
    from fedsca_pipeline.federation.messages.codec import unflatten
    from fedsca_pipeline.federation.run import RunFolder
    from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
    from fedsca_pipeline.federation.site.store import SiteStore, Snapshot
    from fedsca_pipeline.model.site_model import GENERAL_MODEL, discard_site_model, save_site_model

    folder = RunFolder(checkpoints, description["fingerprint"])
    known = {str(manifest["site"].iloc[0]): known_in(manifest, preprocessing.classes) for manifest in manifests}
    known[GENERAL_MODEL] = sorted(set().union(*known.values()))

    def save(target: Path, site: str, snapshot: Snapshot, note: str = "") -> None:
        card = {
            "site": site,
            "strategy": federation.strategy,
            "round": snapshot.round,
            "dice_validation": snapshot.dice,
            "run": folder.fingerprint,
            "foundation": foundation,
            "foundation_sha256": description["foundation"],
            "foundation_root": foundations,
            "image_size": preprocessing.image_size,
            "classes": preprocessing.classes,
            "class_names": preprocessing.names,
            "known_classes": known[site],
            "normalise": preprocessing.normalise,
            "volume": preprocessing.volume,
            "threshold": evaluation.threshold,
            "note": note,
        }
        save_site_model(target, model, snapshot.tensors, card, layout.encoder)

    written = {}
    for site in (site for site in known if site != GENERAL_MODEL):
        store = SiteStore(folder.sites / (POOLED if strategy.pools else site))
        kept = {name: store.snapshot(name) for name in ("best", "last")}
        for name, target in (("best", models / site), ("last", models / site / "last_round")):
            snapshot = kept[name]
            if snapshot is None:
                logger.warning(
                    "%s: no validated model (%s): the site missed the rounds that would have made one", site, name
                )
                discard_site_model(target)
                continue
            save(target, site, snapshot)
        written[site] = {name: {"round": s.round, "dice_validation": s.dice} for name, s in kept.items() if s}
    latest = CheckpointFolder(folder.server).latest()
    shapes = strategy.wire(layout)
    if latest is not None and shapes:
        general = unflatten(strategy.general_model(latest.state, layout=layout), tuple(shapes), shapes)
        tensors = {name: general.get(name, tensor) for name, tensor in start.items()}
        save(models / GENERAL_MODEL, GENERAL_MODEL, Snapshot(federation.rounds, None, tensors), GENERAL_NOTE)
    for folder_of_another_run in models.glob("*/"):
        if folder_of_another_run.name not in {*written, *([GENERAL_MODEL] if shapes else [])}:
            discard_site_model(folder_of_another_run)
    finish_run(checkpoints)
    return {"fingerprint": folder.fingerprint, "strategy": federation.strategy, "seed": run.seed, "sites": written}


def _site_data(site_inputs: tuple[Any, ...]) -> SiteData:
    from fedsca_pipeline.federation.fleets.fleet import SiteData

    pairs = zip(site_inputs[::2], site_inputs[1::2], strict=True)
    return SiteData({str(manifest["site"].iloc[0]): (path, manifest) for manifest, path in pairs})


def start_values(model: SegmentationModel, names: Sequence[str]) -> dict[str, Tensor]:
    """Return copies of a model's parameters, by name."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


def build_trainable(
    foundation: FoundationConfig, adapters: AdaptersConfig, foundations: Path, preprocessing: PreprocessingConfig
) -> tuple[SegmentationModel, TensorLayout]:
    """Return the foundation with adapters attached, on the CPU, and the places of its tensors."""
    from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
    from fedsca_pipeline.model.foundation import load_foundation

    model = load_foundation(foundation, foundations, image_size=preprocessing.image_size, classes=preprocessing.classes)
    attach_adapters(model, adapters)
    return model, tensor_layout(model)
