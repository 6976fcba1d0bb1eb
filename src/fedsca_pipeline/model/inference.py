"""Inference: logits of batches, without gradients and in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedsca_pipeline.compute import autocast
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation.model import SegmentationModel

Forward = Callable[[Batch], Tensor]


def predict_logits(
    model: SegmentationModel, forward: Forward, batches: Iterable[Batch]
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its logits [B, C, S, S] float32, without gradients; ``model`` is in evaluation mode."""
    with evaluation_mode(model):
        for batch in batches:
            with torch.inference_mode(), autocast(batch.inputs.device):
                logits = forward(batch)
            yield batch, logits.float()


def image_forward(model: SegmentationModel) -> Forward:
    """Return the whole model's forward pass, from a batch of images to logits."""

    def forward(batch: Batch) -> Tensor:
        logits: Tensor = model(model.normalise(batch.inputs, batch.valid.unsqueeze(1)))
        return logits

    return forward


@contextmanager
def evaluation_mode(model: SegmentationModel) -> Iterator[None]:
    """Put the model into evaluation mode for a block, then restore its mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
