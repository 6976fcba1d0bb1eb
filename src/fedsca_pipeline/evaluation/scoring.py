"""A model's scores on images of a split, whoever trained it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fedsca_pipeline.federation.site.batches import Batch
from fedsca_pipeline.federation.site.worker import Forward, predictions
from fedsca_pipeline.metrics.images import predict_masks, score_images, truth_masks
from fedsca_pipeline.model.foundation.model import SegmentationModel


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
    """Return the records of ``metrics.score_images`` for all images of ``batches``, in order; none for none.

    Only ``known`` classes may be predicted, and only ``scored`` ones have records, in their order; None means all of
    1..``classes``.
    """
    device = next(model.parameters()).device
    labels = list(scored or range(1, classes + 1))
    channels = [label - 1 for label in labels]
    scores: list[dict[str, Any]] = []
    for batch, logits in predictions(model, forward, (batch.to(device) for batch in batches)):
        predicted = predict_masks(logits, model.head, threshold, known).cpu()
        sizes = torch.stack([batch.valid.any(dim=2).sum(dim=1), batch.valid.any(dim=1).sum(dim=1)], dim=1).cpu()
        truth = truth_masks(batch.masks.cpu(), classes)
        records = score_images(predicted[:, channels], truth[:, channels], sizes)
        scores += [{**record, "class": labels[record["class"] - 1]} for record in records]
    return scores
