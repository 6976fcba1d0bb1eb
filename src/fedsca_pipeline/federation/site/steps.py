"""One site's local steps: settings, a step, its warm-up and its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fedsca_pipeline.compute import autocast, stream_seed
from fedsca_pipeline.config import TrainingConfig
from fedsca_pipeline.federation.messages.manifest import Compression, WireDtype
from fedsca_pipeline.federation.site.batches import SiteBatches
from fedsca_pipeline.federation.site.losses import SegmentationLoss
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.inference import Forward

StepCallback = Callable[[str, int, int, float | None], None]


_REPORT_SECONDS = 0.2


def ignore_step(site: str, step: int, steps: int, loss: float | None) -> None:
    """Report nothing: the default for local work that nobody watches."""


@dataclass(frozen=True)
class LocalSettings:
    """What every site of a run does alike.

    ``cache_bytes``: most that one site's feature cache may take. ``validate_every``: rounds from one validation to the
    next. ``validate_after_training``: whether there is a second one in such a round. ``rounds``: of the run.
    """

    run: str
    seed: int
    classes: int
    wire_dtype: WireDtype
    evaluation_batch: int
    threshold: float
    training: TrainingConfig
    compression: Compression = "zstd"
    cache_bytes: int = 0
    validate_every: int = 1
    validate_after_training: bool = True
    rounds: int = 1


class PlainSteps:
    """The local steps of one site in one round, on one batch after the other."""

    def __init__(self, settings: LocalSettings, site: str, round_: int, device: torch.device) -> None:
        self._settings, self._place, self._device = settings, (site, round_), device
        self.seed = stream_seed(settings.seed, site, round_, "torch")

    def batches(self, batches: SiteBatches) -> Iterator[Batch]:
        """Yield the batches of the round, epoch after epoch, without end."""
        site, round_ = self._place
        for epoch in count():
            yield from batches.training(
                self._settings.training.batch_size, seed=self._settings.seed, site=site, round_=round_, epoch=epoch
            )

    def stepper(self, optimiser: torch.optim.Optimizer) -> Callable[..., Tensor]:
        """Return the step with an optimiser: ``local_step`` on the model's device."""
        clip_norm = self._settings.training.clip_norm

        def step(forward: Forward, batch: Batch, loss_of: SegmentationLoss, *rule: Any) -> Tensor:
            return local_step(forward, batch.to(self._device), loss_of, optimiser, clip_norm, *rule)

        return step

    def settle(self) -> None:
        """Nothing is counted."""


class _Progress:
    """Collects the losses of one site's steps, and tells of some."""

    def __init__(self, site: str, steps: int, on_step: StepCallback) -> None:
        self.losses: list[Tensor] = []
        self._done = 0
        self._site, self._steps, self._on_step = site, steps, on_step
        self._reported = 0.0

    def __call__(self, loss: Tensor | None) -> None:
        self._done += 1
        self.losses += [] if loss is None else [loss]
        # Reading a loss waits for the device; nobody sees more than a few a second.
        if self._done == self._steps or time.monotonic() - self._reported > _REPORT_SECONDS:
            self._on_step(self._site, self._done, self._steps, None if loss is None else float(loss))
            self._reported = time.monotonic()


def local_step(
    forward: Forward,
    batch: Batch,
    loss_of: SegmentationLoss,
    optimiser: torch.optim.Optimizer,
    clip_norm: float,
    penalty: Callable[[], Tensor | None],
    correct: Callable[[], None] = lambda: None,
) -> Tensor:
    """One optimiser step on one batch; returns the detached loss, a scalar on the model's device."""
    with autocast(batch.inputs.device):
        logits = forward(batch)
    loss = loss_of(logits, batch.masks, batch.valid)
    extra = penalty()
    if extra is not None:
        loss = loss + extra
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    correct()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimiser.step()
    return loss.detach()


def warm_up(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Raise the learning rate linearly over the first ``steps`` steps: step s of them runs at s / steps of it.

    A fresh AdamW moves every value by its whole rate in its first step, however small the gradient; with a few steps a
    round that jolt would be a good part of the training (docs/method.md has the measurement).
    """
    if steps < 2:
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    return torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=1 / steps, total_iters=steps - 1)
