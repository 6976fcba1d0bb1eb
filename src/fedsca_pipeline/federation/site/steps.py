"""The local steps of one site: settings, plain steps, warm-up and progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsca_pipeline.compute import autocast, stream_seed
from fedsca_pipeline.config import TrainingConfig
from fedsca_pipeline.federation.messages.manifest import Compression, PrivacySpent, WireDtype
from fedsca_pipeline.federation.site.batches import SiteBatches
from fedsca_pipeline.federation.site.losses import SegmentationLoss
from fedsca_pipeline.federation.strategies.rules import Phase
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.inference import Forward

StepCallback = Callable[[str, int, int, float | None], None]
"""Called with the site, the number of steps done, the number of steps in all, and the loss (None if private)."""

Penalty = Callable[[], Tensor | None]
Correction = Callable[[], None]
Step = Callable[[Forward, Any, SegmentationLoss, Penalty, Correction], Tensor | None]
"""One optimiser step on what ``LocalSteps.batches`` yields; returns the loss, a scalar, or None if it is private."""

_REPORT_SECONDS = 0.2


def ignore_step(site: str, step: int, steps: int, loss: float | None) -> None:
    """Ignore a step; the ``StepCallback`` of local work whose progress is not shown."""


@dataclass(frozen=True)
class LocalSettings:
    """The settings that all sites of a run share.

    ``cache_bytes``: the most that one site's feature cache may take. ``validate_every``: rounds from one validation to
    the next. ``validate_after_training``: whether such a round validates again after its training. ``rounds``: of the
    run.
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


class LocalSteps(Protocol):
    """The local steps of one site in one round, plain or differentially private; ``seed`` is that of dropout."""

    seed: int

    def record(self) -> PrivacySpent | None:
        """Record the round's privacy cost before it trains, and return what the site has spent; None: no privacy."""
        ...

    def batches(self, batches: SiteBatches) -> Iterator[Any]:
        """Yield what each step trains on, without end."""
        ...

    def stepper(self, optimiser: torch.optim.Optimizer) -> Step:
        """Return the step that uses ``optimiser``."""
        ...


class PlainSteps:
    """Local steps without differential privacy: one batch after the other."""

    def __init__(self, settings: LocalSettings, site: str, round_: int, device: torch.device) -> None:
        self._settings, self._site, self._round, self._device = settings, site, round_, device
        self.seed = stream_seed(settings.seed, site, round_, "torch")

    def record(self) -> None:
        """Return None: plain steps have no privacy cost to record."""

    def batches(self, batches: SiteBatches) -> Iterator[Batch]:
        """Yield the round's batches, epoch after epoch, without end."""
        size, seed = self._settings.training.batch_size, self._settings.seed
        for epoch in count():
            yield from batches.training(size, seed=seed, site=self._site, round_=self._round, epoch=epoch)

    def stepper(self, optimiser: torch.optim.Optimizer) -> Step:
        """Return :func:`local_step` with this optimiser, on the model's device."""
        clip_norm = self._settings.training.clip_norm

        def step(
            forward: Forward, batch: Batch, loss_of: SegmentationLoss, penalty: Penalty, correct: Correction
        ) -> Tensor:
            return local_step(forward, batch.to(self._device), loss_of, optimiser, clip_norm, penalty, correct)

        return step


class Progress:
    """Collects the losses of one site's steps, and calls ``on_step`` a few times a second and after the last step."""

    def __init__(self, site: str, steps: int, on_step: StepCallback) -> None:
        self.losses: list[Tensor] = []
        self._done = 0
        self._site, self._steps, self._on_step = site, steps, on_step
        self._reported = 0.0

    def __call__(self, loss: Tensor | None) -> None:
        """Count a step and collect its loss, None if it is private."""
        self._done += 1
        self.losses += [] if loss is None else [loss]
        # To read a loss is to wait for the device.
        if self._done == self._steps or time.monotonic() - self._reported > _REPORT_SECONDS:
            self._on_step(self._site, self._done, self._steps, None if loss is None else float(loss))
            self._reported = time.monotonic()


def local_step(
    forward: Forward,
    batch: Batch,
    loss_of: SegmentationLoss,
    optimiser: torch.optim.Optimizer,
    clip_norm: float,
    penalty: Penalty,
    correct: Correction = lambda: None,
) -> Tensor:
    """Make one optimiser step on one batch, and return the detached loss, a scalar on the model's device."""
    with autocast(batch.inputs.device):
        logits = forward(batch)
    loss = loss_of(logits, batch.masks, batch.valid)
    extra = penalty()
    if extra is not None:
        loss = loss + extra
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    correct()
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimiser.step()
    return loss.detach()


def warm_up(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that raises the learning rate linearly: step s of the first ``steps`` runs at s / steps of it.

    The first step of a new AdamW moves every value by its whole rate, however small the gradient; with a few steps per
    round that is a large part of the training (measured in docs/method.md).
    """
    if steps < 2:
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    return torch.optim.lr_scheduler.LinearLR(optimiser, start_factor=1 / steps, total_iters=steps - 1)


def phase_lengths(phases: Sequence[Phase], steps: int) -> list[int]:
    """Return the number of steps of each phase: its share of ``steps``, at least one.

    Shares that sum to 1 sum to ``steps``, unless a phase was raised to one step.

    >>> phase_lengths([Phase(("decoder",), 0.25), Phase(("adapter",), 0.75)], 8)
    [2, 6]
    """
    ends = [0, *(round(share * steps) for share in accumulate(phase.share for phase in phases))]
    return [max(1, end - start) for start, end in pairwise(ends)]
