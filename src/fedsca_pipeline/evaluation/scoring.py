"""Scores of models on batches of images, and of a site's models on its test images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedsca_pipeline.config import EvaluationConfig, Settings
from fedsca_pipeline.metrics.images import score_images
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.heads import predict_masks, truth_masks
from fedsca_pipeline.model.inference import Forward, image_forward, predict_logits

if TYPE_CHECKING:
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.model.in_turn import ModelsInTurn


def score_batches(
    model: SegmentationModel,
    forward: Forward,
    batches: Iterable[Batch],
    classes: int,
    threshold: float,
    *,
    known: Sequence[int] | None = None,
    scored: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return the records of ``metrics.images.score_images`` for all images of ``batches``, in order.

    Args:
        model: sets the device and the head, and is in evaluation mode meanwhile.
        forward: returns a batch's logits.
        batches: on any device.
        classes: K.
        threshold: as in ``heads.predict_masks``.
        known: classes that may be predicted; None: all of 1..K.
        scored: classes that have records, in this order; None: all of 1..K.
    """
    device = next(model.parameters()).device
    labels = list(scored or range(1, classes + 1))
    channels = [label - 1 for label in labels]
    scores: list[dict[str, Any]] = []
    for batch, logits in predict_logits(model, forward, (batch.to(device) for batch in batches)):
        predicted = predict_masks(logits, model.head, threshold, known).cpu()
        sizes = torch.stack([batch.valid.any(dim=2).sum(dim=1), batch.valid.any(dim=1).sum(dim=1)], dim=1).cpu()
        truth = truth_masks(batch.masks.cpu(), classes)
        records = score_images(predicted[:, channels], truth[:, channels], sizes)
        scores += [{**record, "class": labels[record["class"] - 1]} for record in records]
    return scores


def score_test_images(
    in_turn: ModelsInTurn,
    settings: Settings,
    site_models: Mapping[str, Any],
    models: Path,
    manifest: pd.DataFrame,
    arrays: Path,
) -> pd.DataFrame:
    """Return the scores of one site's test images, by each of its reported models, on the network of ``in_turn``.

    The models are the foundation (``before``), the last one (``after``) and the chosen one. A site that never answered
    has no model, and only ``before``.
    """
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.evaluation.tables import image_table

    site = str(manifest["site"].iloc[0])
    data, snapshots = SiteArrays(arrays, manifest), site_models["sites"][site]
    tables: dict[str, pd.DataFrame] = {}
    for model, snapshot in SNAPSHOTS.items():
        if snapshot not in snapshots and model != "before":
            continue
        if model == "chosen" and "after" in tables and snapshots["best"]["round"] == snapshots["last"]["round"]:
            tables[model] = tables["after"].assign(model=model)
            continue
        with reported(in_turn, model, models / site) as network:
            scores = _score(network, data, settings.preprocessing.classes, settings.evaluation)
        tables[model] = image_table(site, data.names("test"), scores, model)
    return pd.concat(tables.values(), ignore_index=True)


SNAPSHOTS = {"before": "", "after": "last", "chosen": "best"}
"""A site's snapshot by reported model, in the order of tables; ``before`` is the foundation."""


def reported(in_turn: ModelsInTurn, model: str, folder: Path) -> AbstractContextManager[SegmentationModel]:
    """Lend a reported model, a key of ``SNAPSHOTS``, of the site whose models are in ``folder``."""
    if model == "before":
        return in_turn.foundation()
    return in_turn.saved(folder / "last_round" if model == "after" else folder)


def _score(network: Any, data: SiteArrays, classes: int, evaluation: EvaluationConfig) -> list[dict[str, Any]]:
    from fedsca_pipeline.data.arrays import known_classes, scored_classes
    from fedsca_pipeline.federation.site.batches import plain_batches

    return score_batches(
        network,
        image_forward(network),
        plain_batches(data, "test", evaluation.batch_size),
        classes,
        evaluation.threshold,
        known=known_classes(data, classes),
        scored=scored_classes(data, classes),
    )
