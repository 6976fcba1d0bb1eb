"""Each site's models of a finished run, written to disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

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
    """
    settings, strategy, layout = setup.settings, setup.strategy, setup.layout
    preprocessing, federation = settings.preprocessing, settings.federation
    folder = RunFolder(checkpoints, description["fingerprint"])
    known = {str(manifest["site"].iloc[0]): known_in(manifest, preprocessing.classes) for manifest in manifests}
    known[GENERAL_MODEL] = tuple(sorted(set().union(*known.values())))

    def save(target: Path, site: str, snapshot: Snapshot, note: str = "") -> None:
        card = {
            "site": site,
            "strategy": federation.strategy,
            "round": snapshot.round,
            "dice_validation": snapshot.dice,
            "run": folder.fingerprint,
            "foundation": settings.foundation,
            "foundation_sha256": description["foundation"],
            "foundation_root": foundations,
            "image_size": preprocessing.image_size,
            "classes": preprocessing.classes,
            "class_names": preprocessing.names,
            "known_classes": known[site],
            "normalise": preprocessing.normalise,
            "volume": preprocessing.volume,
            "threshold": settings.evaluation.threshold,
            "note": note,
        }
        save_site_model(target, setup.model, snapshot.tensors, card, layout.encoder)

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
    shapes = strategy.wire_shapes()
    if latest is not None and shapes:
        general = unflatten(strategy.general_model(latest.state), tuple(shapes), shapes)
        tensors = {name: general.get(name, tensor) for name, tensor in start.items()}
        save(models / GENERAL_MODEL, GENERAL_MODEL, Snapshot(federation.rounds, None, tensors), GENERAL_NOTE)
    for folder_of_another_run in models.glob("*/"):
        if folder_of_another_run.name not in {*written, *([GENERAL_MODEL] if shapes else [])}:
            discard_site_model(folder_of_another_run)
    finish_run(checkpoints)
    return {
        "fingerprint": folder.fingerprint,
        "strategy": federation.strategy,
        "seed": settings.run.seed,
        "sites": written,
    }
