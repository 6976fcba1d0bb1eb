"""Each site's models of a finished run, written to disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from fedsca_pipeline.config import Settings
from fedsca_pipeline.data.manifest import known_in
from fedsca_pipeline.federation.fleets.data import POOLED
from fedsca_pipeline.federation.run import RunFolder, finish_run
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.setup import Setup
from fedsca_pipeline.federation.site.store import SiteStore, Snapshot
from fedsca_pipeline.model.layout import unflatten
from fedsca_pipeline.model.site_model import GENERAL_MODEL, discard_site_model, save_site_model

logger = logging.getLogger(__name__)

GENERAL_NOTE = (
    "General model (docs/method.md): the mean of all sites' shared tensors beside the foundation's own decoder and "
    "high adapters. Alone it is not a usable segmenter; tune its private tensors on labelled images first."
)


def write_site_models(
    setup: Setup,
    start: Mapping[str, Tensor],
    description: Mapping[str, Any],
    manifests: Sequence[pd.DataFrame],
    foundations: Path,
    checkpoints: Path,
    models: Path,
) -> dict[str, Any]:
    """Write each site's model that validation chose, its last one below it, and the general model; return an index.

    Args:
        setup: its model may have been trained; every tensor that the strategy trains is overwritten.
        start: start values of all tensors that the strategy trains.
        description: of the run.
        manifests: one per site.
        foundations, checkpoints, models: folders.

    Raises:
        ResumeError: a site's best model was lost.
    """
    settings, strategy = setup.settings, setup.strategy
    folder = RunFolder(checkpoints, description["fingerprint"])
    known = {
        str(manifest["site"].iloc[0]): known_in(manifest, settings.preprocessing.classes) for manifest in manifests
    }
    card = _card(settings, description, foundations)

    def save(target: Path, site: str, snapshot: Snapshot, known_classes: Sequence[int], note: str = "") -> None:
        own = {"site": site, "round": snapshot.round, "dice_validation": snapshot.dice, "known_classes": known_classes}
        save_site_model(target, setup.model, snapshot.tensors, {**card, **own, "note": note}, setup.layout.encoder)

    written = {}
    for site, classes in known.items():
        store = SiteStore(folder.sites / (POOLED if strategy.pools else site), folder.fingerprint)
        snapshots = store.models()
        for name, target in (("best", models / site), ("last", models / site / "last_round")):
            snapshot = snapshots[name]
            if snapshot is None:
                logger.warning("%s: no %s model: the site missed the rounds that would have made one", site, name)
                discard_site_model(target)
                continue
            save(target, site, snapshot, classes)
        written[site] = {name: {"round": s.round, "dice_validation": s.dice} for name, s in snapshots.items() if s}
    general = _general_tensors(setup, start, folder)
    if general is not None:
        anywhere = sorted(set().union(*known.values()))
        last = Snapshot(settings.federation.rounds, None, general)
        save(models / GENERAL_MODEL, GENERAL_MODEL, last, anywhere, GENERAL_NOTE)
    current = {*written, *([GENERAL_MODEL] if strategy.wire_shapes() else [])}
    for other in models.glob("*/"):
        if other.name not in current:
            discard_site_model(other)
    finish_run(checkpoints)
    return {
        "fingerprint": folder.fingerprint,
        "strategy": settings.federation.strategy,
        "seed": settings.run.seed,
        "sites": written,
    }


def _card(settings: Settings, description: Mapping[str, Any], foundations: Path) -> dict[str, Any]:
    """Return what the cards of all models of a run share."""
    preprocessing = settings.preprocessing
    return {
        "strategy": settings.federation.strategy,
        "run": description["fingerprint"],
        "foundation": settings.foundation,
        "foundation_sha256": description["foundation"],
        "foundation_root": foundations,
        "image_size": preprocessing.image_size,
        "classes": preprocessing.classes,
        "class_names": preprocessing.names,
        "normalise": preprocessing.normalise,
        "volume": preprocessing.volume,
        "threshold": settings.evaluation.threshold,
    }


def _general_tensors(setup: Setup, start: Mapping[str, Tensor], folder: RunFolder) -> dict[str, Tensor] | None:
    """Return the general model's tensors; None if nothing is shared or no round is done."""
    latest, shapes = CheckpointFolder(folder.server, folder.fingerprint).latest(), setup.strategy.wire_shapes()
    if latest is None or not shapes:
        return None
    general = setup.strategy.general_model(latest.state, setup.settings.federation.max_share)
    shared = unflatten(general, tuple(shapes), shapes)
    return {name: shared.get(name, tensor) for name, tensor in start.items()}
