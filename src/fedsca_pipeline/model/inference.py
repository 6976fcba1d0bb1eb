"""Inference: the forward of a model on batches, without gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fedsca_pipeline.compute import autocast
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation.model import SegmentationModel

Forward = Callable[[Batch], Tensor]


def predictions(model: SegmentationModel, forward: Forward, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its logits [B,C,S,S] float32, without gradients and with ``model`` in evaluation mode."""
    with evaluating(model):
        for batch in batches:
            with torch.inference_mode(), autocast(batch.inputs.device):
                logits = forward(batch)
            yield batch, logits.float()


def whole_model(model: SegmentationModel) -> Forward:
    """Return the forward of a model on batches of images."""
    return lambda batch: model(model.normalise(batch.inputs, batch.valid.unsqueeze(1)))


@contextmanager
def evaluating(model: SegmentationModel) -> Iterator[None]:
    """Have the model in evaluation mode for a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
