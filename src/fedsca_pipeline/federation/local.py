"""One site's work in one round: receive, validate, train, reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsca_pipeline.config import TrainingConfig
from fedsca_pipeline.errors import SiteError
from fedsca_pipeline.evaluation.metrics import dice_per_image, predict_masks, truth_masks
from fedsca_pipeline.federation.batches import AS_IT_STANDS, VIEWS, Batch, SiteBatches, build_augmentation
from fedsca_pipeline.federation.devices import autocast, stream_seed
from fedsca_pipeline.federation.losses import SegmentationLoss, build_loss
from fedsca_pipeline.federation.messages import (
    Compression,
    Manifest,
    Message,
    TensorLayout,
    as_decoded,
    check,
    decode,
    encode,
    hash_tensors,
    most_bytes,
)
from fedsca_pipeline.federation.prefix import FeatureCache, SplitModel
from fedsca_pipeline.federation.store import SiteState, SiteStore, Snapshot
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.foundation.model import SegmentationModel
from fedsca_pipeline.sites.arrays import SiteArrays

Tensors = Mapping[str, Tensor]
Forward = Callable[[Batch], Tensor]
StepCallback = Callable[[str, int, int, float], None]


_REPORT_SECONDS = 0.2


def ignore_step(site: str, step: int, steps: int, loss: float) -> None:
    """Report nothing: the default for local work that nobody watches."""


@dataclass(frozen=True)
class LocalSettings:
    """What every site of a run does alike. ``cache_bytes``: most that one site's feature cache may take."""

    run: str
    seed: int
    classes: int
    wire_dtype: str
    evaluation_batch: int
    threshold: float
    training: TrainingConfig
    compression: Compression = "zstd"
    cache_bytes: int = 0


class LocalWorker:
    """Does any site's local work on one model in memory: the foundation is shared, a site is its tensors and data.

    Args:
        model: foundation with adapters attached, on its device.
        layout: the model's trainable tensors, at their start values: what a site begins with.
        strategy: answers which tensors train and travel, and how a local step differs.
        settings: the run's settings.
    """

    def __init__(
        self, model: SegmentationModel, layout: TensorLayout, strategy: Strategy, settings: LocalSettings
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.settings = settings
        self.shared = strategy.shared(layout)
        self.trained = strategy.trained(layout)
        self.parameters = {name: p for name, p in model.named_parameters() if name in layout.shapes}
        self.shapes = {name: layout.shapes[name] for name in self.shared}
        self.decoder = frozenset(layout.decoder)
        self.initial = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        trained = frozenset(self.trained)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)
        self.loss: SegmentationLoss = build_loss(model.head, settings.training.dice_weight)
        self.augmentation = build_augmentation(settings.training.augment)
        self.device = next(iter(model.parameters())).device
        self.split = SplitModel(model, layout.shapes)

    def work(
        self, payload: bytes, round_: int, site: str, data: SiteArrays, store: SiteStore, on_step: StepCallback
    ) -> bytes:
        """Answer one payload, the same way however often it comes.

        Installs the aggregate, validates the model of the round before (keeping the best), and, unless the payload is
        ``final``, trains and returns the update. Validation Dice travels as ``dice_validation``, that right after local
        training as ``dice_local``.

        Raises:
            MessageError: the payload is not the one this site expects.
            SiteError: the loss is not finite.
        """
        started = time.perf_counter()
        state = store.state_before(round_)
        base, final = self._receive(decode(payload, max_bytes=most_bytes(self.shapes)), round_, site, state)
        private = dict(state.private) if state else {n: t for n, t in self.initial.items() if n not in self.shapes}
        self._install({**private, **base})
        batches = self._batches(data, store)
        metrics = {"dice_validation": self._validate(batches)}
        if state is not None or final:
            self._keep(store, Snapshot(round_ - 1, metrics["dice_validation"], self._tensors()), final=final)
        samples = len(data.rows("train"))
        reply = Manifest(
            kind="report" if final else "update",
            run=self.settings.run,
            round=round_,
            site=site,
            base_hash=hash_tensors(base),
            samples=samples,
            dtype=self.settings.wire_dtype,
            relative=False,
            metrics=metrics,
        )
        if final:
            return encode(reply, {}, self.settings.compression)
        loss, moments = self._train(batches, site, round_, base, state, on_step)
        trained = self._tensors()
        if not all(tensor.isfinite().all() for tensor in trained.values()):
            raise _diverged(site, round_, "the trained tensors are")
        update = {name: trained[name] - base[name] for name in self.shared}
        sent, residual = self._round_update(update, state)
        metrics |= {"loss": loss, "dice_local": self._validate(batches), "seconds": time.perf_counter() - started}
        answer = encode(replace(reply, metrics=metrics), sent, self.settings.compression)
        # Last, so that a state is only ever one whose update can be sent.
        store.save_state(
            SiteState(round_, {n: t for n, t in trained.items() if n not in self.shapes}, base, residual, moments)
        )
        return answer

    def _receive(self, message: Message, round_: int, site: str, state: SiteState | None) -> tuple[Tensors, bool]:
        manifest = message.manifest
        base_hash = hash_tensors(state.base) if manifest.relative and state else None
        check(
            message,
            kind=manifest.kind if manifest.kind in ("aggregate", "final") else "aggregate",
            run=self.settings.run,
            round=round_,
            site=site,
            base_hash=base_hash,
            shapes=self.shapes,
        )
        if manifest.relative and state is None:
            raise SiteError(f"{site}: round {round_} came as a difference, but this site holds nothing to add it to")
        base = message.tensors
        if manifest.relative and state is not None:
            base = {name: state.base[name] + t for name, t in message.tensors.items()}
        return base, manifest.kind == "final"

    def _install(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def _keep(self, store: SiteStore, snapshot: Snapshot, *, final: bool) -> None:
        if snapshot.dice > store.best_dice(before=snapshot.round):
            store.save_snapshot("best", snapshot)
        if final:
            store.save_snapshot("last", snapshot)

    def _batches(self, data: SiteArrays, store: SiteStore) -> SiteBatches:
        validation = [(int(row), AS_IT_STANDS) for row in data.rows("validation")]
        # Jittered intensities never come twice, and are nobody's view.
        views = () if self.settings.training.augment.intensity else VIEWS
        training = [(int(row), view) for row in data.rows("train") for view in views]
        cache = FeatureCache(
            store.feature_cache, [*validation, *training], self.split.feature_shape, self.settings.cache_bytes
        )
        return SiteBatches(data, self._embed, self.augmentation, cache)

    def _embed(self, images: Tensor, valid: Tensor) -> Tensor:
        return self.split.features(images.to(self.device), valid.to(self.device))

    def _forward(self, batch: Batch) -> Tensor:
        return self.split.logits(batch.inputs)

    def _validate(self, batches: SiteBatches) -> float:
        validation = batches.plain("validation", self.settings.evaluation_batch)
        return mean_dice(self.model, self._forward, validation, self.settings.classes, self.settings.threshold)

    def _train(
        self,
        batches: SiteBatches,
        site: str,
        round_: int,
        base: Tensors,
        state: SiteState | None,
        on_step: StepCallback,
    ) -> tuple[float, dict[str, Tensor]]:
        training = self.settings.training
        optimiser = self._optimiser(state)
        schedule = warm_up(optimiser, training.warmup_steps)
        received = {name: tensor.to(self.device) for name, tensor in base.items()}
        trained = {name: self.parameters[name] for name in self.trained}
        steps = training.local_epochs * batches.count(training.batch_size)
        losses: list[Tensor] = []
        reported = 0.0
        self.model.train()
        # Dropout draws from torch's own generator; seeded here, it draws the same again after a resume.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(self.settings.seed, site, round_, "torch"))
            for epoch in range(training.local_epochs):
                place = {"seed": self.settings.seed, "site": site, "round_": round_, "epoch": epoch}
                for batch in batches.training(training.batch_size, **place):
                    loss = local_step(self._forward, batch.to(self.device), self.loss, optimiser, training.clip_norm,
                                      lambda: self.strategy.penalty(trained, received))  # fmt: skip
                    schedule.step()
                    losses.append(loss)
                    # Reading a loss waits for the device; nobody sees more than a few a second.
                    if len(losses) == steps or time.monotonic() - reported > _REPORT_SECONDS:
                        on_step(site, len(losses), steps, float(loss))
                        reported = time.monotonic()
        mean = float(torch.stack(losses).double().mean())
        if not torch.isfinite(torch.stack(losses)).all():
            raise _diverged(site, round_, "the loss was")
        return mean, self._moments(optimiser)

    def _optimiser(self, state: SiteState | None) -> torch.optim.AdamW:
        training = self.settings.training
        rates = {False: training.learning_rate, True: training.learning_rate * training.decoder_factor}
        groups = [
            {"params": [self.parameters[n] for n in self.trained if (n in self.decoder) == in_decoder], "lr": rate}
            for in_decoder, rate in rates.items()
        ]
        optimiser = torch.optim.AdamW(
            [g for g in groups if g["params"]], weight_decay=training.weight_decay, fused=True
        )
        if training.keep_optimizer and state is not None:
            for name in self.trained:
                if f"{name}/step" in state.moments:
                    parameter = self.parameters[name]
                    optimiser.state[parameter] = {
                        key: state.moments[f"{name}/{key}"].clone().to(parameter.device)
                        for key in ("step", "exp_avg", "exp_avg_sq")
                    }
        return optimiser

    def _moments(self, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
        if not self.settings.training.keep_optimizer:
            return {}
        return {
            f"{name}/{key}": value.detach().cpu().clone()
            for name in self.trained
            if name not in self.shapes
            for key, value in optimiser.state[self.parameters[name]].items()
        }

    def _round_update(self, update: Tensors, state: SiteState | None) -> tuple[Tensors, dict[str, Tensor]]:
        """Error feedback: what rounding takes from this update is added to the next one (int8 only)."""
        if self.settings.wire_dtype != "int8":
            return update, {}
        residual = state.residual if state else {}
        wanted = {name: t + residual[name] if name in residual else t for name, t in update.items()}
        heard = as_decoded(wanted, "int8")
        return wanted, {name: wanted[name] - heard[name] for name in wanted}


def _diverged(site: str, round_: int, what: str) -> SiteError:
    return SiteError(f"{site}: {what} not finite in round {round_}; lower training.learning_rate or look at its images")


def local_step(
    forward: Forward,
    batch: Batch,
    loss_of: SegmentationLoss,
    optimiser: torch.optim.Optimizer,
    clip_norm: float,
    penalty: Callable[[], Tensor | None],
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


def mean_dice(
    model: SegmentationModel, forward: Forward, batches: Iterable[Batch], classes: int, threshold: float
) -> float:
    """Return the mean over images of the mean Dice over classes, in [0, 1]; 0 where there is no image."""
    device = next(iter(model.parameters())).device
    scores = [
        dice_per_image(
            predict_masks(logits, model.head, threshold), truth_masks(batch.masks, classes), batch.valid
        ).mean(dim=1)
        for batch, logits in predictions(model, forward, (batch.to(device) for batch in batches))
    ]
    return float(torch.cat(scores).mean()) if scores else 0.0


def predictions(model: SegmentationModel, forward: Forward, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield each batch with its logits [B,C,S,S] float32, without gradients and with ``model`` in evaluation mode."""
    with _evaluating(model):
        for batch in batches:
            with torch.inference_mode(), autocast(batch.inputs.device):
                logits = forward(batch)
            yield batch, logits.float()


def whole_model(model: SegmentationModel) -> Forward:
    """Return the forward of a model on batches of images."""
    return lambda batch: model(model.normalise(batch.inputs, batch.valid.unsqueeze(1)))


@contextmanager
def _evaluating(model: SegmentationModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
