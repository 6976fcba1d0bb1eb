"""A site's work in one round: receive, validate, train, answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

from fedsca_pipeline.compute import autocast_dtype, processor_of
from fedsca_pipeline.data.arrays import Arrays, known_classes
from fedsca_pipeline.errors import SiteError
from fedsca_pipeline.federation.messages.codec import TRAVELLING, as_decoded, check, decode, encode, most_bytes
from fedsca_pipeline.federation.messages.manifest import Manifest, PrivacySpent
from fedsca_pipeline.federation.site.adamw import build_optimiser, moments_of
from fedsca_pipeline.federation.site.batches import UNCHANGED, VIEWS, SiteBatches
from fedsca_pipeline.federation.site.losses import SegmentationLoss, build_loss, over_known_classes
from fedsca_pipeline.federation.site.prefix import FeatureCache, SplitModel
from fedsca_pipeline.federation.site.privacy.steps import PrivateSteps, RoundPlan
from fedsca_pipeline.federation.site.site_round import SiteRound, Tensors
from fedsca_pipeline.federation.site.steps import (
    LocalSettings,
    LocalSteps,
    PlainSteps,
    Progress,
    StepCallback,
    phase_lengths,
    warm_up,
)
from fedsca_pipeline.federation.site.store import SiteState, SiteStore, Snapshot
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.metrics.images import dice_per_image
from fedsca_pipeline.model.batch import Batch, to_device
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.half import HalfWeights
from fedsca_pipeline.model.heads import predict_masks, truth_masks
from fedsca_pipeline.model.inference import Forward, predict_logits
from fedsca_pipeline.model.layout import hash_tensors, sha256_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The result of one round's local training; tensors by name, fp32, on the CPU.

    ``tensors`` belong to the model of which a part is shared, ``personal`` to the personal copy, if there is one.
    ``rule_state`` and ``extra`` come from the local rule. ``steps`` lie behind ``tensors``; ``loss`` is the mean over
    all steps, None if it stays private.
    """

    tensors: Tensors
    personal: Tensors
    moments: Tensors
    rule_state: Tensors
    extra: Tensors
    steps: int
    loss: float | None


class LocalWorker:
    """Does any site's local work on one model in memory: sites share the foundation and differ in tensors and data.

    Args:
        model: foundation with adapters attached, on its device, its trainable tensors at their start values.
        strategy: decides which tensors train and cross the wire, and how a local step differs.
        settings: the run's settings.
    """

    def __init__(self, model: SegmentationModel, strategy: Strategy, settings: LocalSettings) -> None:
        self.model = model
        self.strategy = strategy
        self.settings = settings
        self.shared = strategy.shared()
        self.phases = strategy.phases()
        self.shapes = strategy.wire_shapes()
        self.decoder = frozenset(strategy.layout.decoder)
        trained = frozenset(strategy.trained())
        self.parameters = {name: p for name, p in model.named_parameters() if name in trained}
        self.initial = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.loss: SegmentationLoss = build_loss(model.head, settings.training.dice_weight)
        self.device = next(iter(model.parameters())).device
        self.split = SplitModel(model, trained)
        self._half = HalfWeights(model, trained, autocast_dtype(self.device))

    def work(
        self, payload: bytes, round_: int, site: str, data: Arrays, store: SiteStore, on_step: StepCallback
    ) -> bytes:
        """Return a site's answer to one payload; the same payload always gets the same answer.

        The site validates the model of the previous round and stores it if it is the best so far. Unless the payload is
        ``final``, it then trains and sends its update. Validation Dice is the metric ``dice_validation``, Dice right
        after local training ``dice_local``.

        Raises:
            MessageError: the payload is not the one this site expects.
            SiteError: the loss is not finite, or the round would cost more privacy than is left.
        """
        started = time.perf_counter()
        this = self._receive(payload, round_, site, data, store, on_step)
        metrics = self._validate_received(this)
        if this.final:
            return self._answer(this, {}, metrics)
        steps = self._local_steps(this)
        # Before the training: even a training that fails reveals something about the images.
        privacy = steps.record()
        trained = self._train(this, steps)
        update, residual = self._update(this, trained)
        if self.settings.validate_after_training and self._validates(round_):
            metrics["dice_local"] = self._validate(this)
        metrics |= {} if trained.loss is None else {"loss": trained.loss}
        metrics |= {"steps": trained.steps, "seconds": time.perf_counter() - started}
        answer = self._answer(this, update, metrics, privacy)
        # Last, so that a stored state always has an update that could be sent.
        store.save_state(self._state_after(this, trained, residual), this.answered)
        return answer

    def tune(
        self, data: Arrays, tensors: Tensors, names: Collection[str], steps: int, *, site: str
    ) -> dict[str, Tensor]:
        """Return ``tensors``, a whole model's, after ``steps`` local steps of ``names`` on the data's training images.

        An unseen site adapts a federation's model this way (docs/comparison.md). The strategy has no influence on it.

        Raises:
            SiteError: the loss is not finite.
        """
        self.install(tensors)
        phase = Phase(tuple(name for name in self.parameters if name in names))
        no_cache = FeatureCache(Path("unused"), (), (), 0)
        batches = SiteBatches(data, self._embed, self.settings.training.augment, no_cache, self.device)
        plain = PlainSteps(self.settings, site, round_=0, device=self.device)
        loss = self._loss_over(known_classes(data, self.settings.classes))
        with self._training(plain.seed):
            stream = islice(plain.batches(batches), steps)
            self._run_phase(phase, stream, plain, self._optimiser(phase, {}), loss, LocalRule({}, {}), lambda _: None)
        tuned = self._tensors()
        _check_finite(tuned, site, 0, "the tuned tensors are")
        return tuned

    def install(self, tensors: Tensors) -> None:
        """Copy tensors into the model; names that are not among its trained tensors are skipped."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name in tensors:
                    parameter.copy_(tensors[name])

    # Receive

    def _receive(
        self, payload: bytes, round_: int, site: str, data: Arrays, store: SiteStore, on_step: StepCallback
    ) -> SiteRound:
        """Decode and check a payload, and return the round that it starts."""
        message = decode(payload, max_bytes=most_bytes(self.shapes))
        manifest, state = message.manifest, store.state_at(message.manifest.answered)
        check(
            message,
            kind=manifest.kind if manifest.kind in ("aggregate", "final") else "aggregate",
            run=self.settings.run,
            round=round_,
            site=site,
            base_hash=hash_tensors(state.base) if manifest.relative and state else None,
            shapes=self.shapes,
            dtypes=TRAVELLING[self.settings.wire_dtype],
        )
        if manifest.relative and state is None:
            raise SiteError(f"{site}: round {round_} came as a difference, but this site has no base to add it to")
        base: Tensors = message.tensors
        if manifest.relative and state is not None:
            base = {name: state.base[name] + t for name, t in message.tensors.items()}
        if manifest.answered and (state is None or state.round != manifest.answered):
            logger.warning(
                "%s: its state of round %d is missing; it resumes from an earlier one", site, manifest.answered
            )
        private = state.private if state else {n: t for n, t in self.initial.items() if n not in self.shapes}
        return SiteRound(
            site=site,
            round=round_,
            final=manifest.kind == "final",
            answered=manifest.answered,
            base=base,
            received={**private, **base},
            state=state,
            data=data,
            store=store,
            batches=self._batches(data, store),
            known_classes=known_classes(data, self.settings.classes),
            on_step=on_step,
        )

    def _batches(self, data: Arrays, store: SiteStore) -> SiteBatches:
        validation = [(int(row), UNCHANGED) for row in data.rows("validation")]
        # Jittered intensities are drawn for each use, so there is nothing to cache.
        views = () if self.settings.training.augment.intensity else VIEWS
        training = [(int(row), view) for row in data.rows("train") for view in views]
        max_bytes = self.settings.cache_bytes if self.split.worth_caching else 0
        cache = FeatureCache(store.feature_cache, [*validation, *training], self.split.feature_shape, max_bytes)
        return SiteBatches(data, self._embed, self.settings.training.augment, cache, self.device)

    def _embed(self, images: Tensor, valid: Tensor) -> Tensor:
        return self.split.features(to_device(images, self.device), to_device(valid, self.device))

    # Validate

    def _validate_received(self, this: SiteRound) -> dict[str, float]:
        """Validate the model of the previous round, store it if it is the best or the last, and return its metrics."""
        self.install({**this.received, **this.personal})
        metrics: dict[str, float] = {}
        if this.final or self._validates(this.round - 1):
            dice = metrics["dice_validation"] = self._validate(this)
            if this.state is not None or this.final:
                snapshot = Snapshot(this.round - 1, dice, self._tensors())
                known = this.state.best if this.state else None
                if dice > this.store.best_dice(before=snapshot.round, known=known):
                    this.store.save_snapshot("best", snapshot)
                if this.final:
                    this.store.save_snapshot("last", snapshot)
        return metrics

    def _validates(self, round_: int) -> bool:
        return round_ % self.settings.validate_every == 0

    def _validate(self, this: SiteRound) -> float:
        batches = this.batches.plain("validation", self.settings.evaluation_batch)
        with self._half.in_use():
            return mean_dice(self.model, self._forward, batches, this.known_classes, self.settings.threshold)

    def _forward(self, batch: Batch) -> Tensor:
        return self.split.logits(batch.inputs)

    # Train

    def _local_steps(self, this: SiteRound) -> LocalSteps:
        """Return the round's local steps: plain ones, or differentially private ones."""
        training = self.settings.training
        if training.privacy.epsilon is None:
            return PlainSteps(self.settings, this.site, this.round, self.device)
        if this.store.ledger is None:
            raise SiteError(f"{this.site}: training.privacy needs a folder for the site's secret and privacy ledger")
        plan = RoundPlan(
            site=this.site,
            run=self.settings.run,
            round=this.round,
            steps=sum(self._lengths(this)),
            rounds=self.settings.rounds,
            batch_size=training.batch_size,
        )
        start = {"received": this.base, **(this.state.tensors() if this.state else {})}
        inputs = {
            "site": this.site,
            "round": str(this.round),
            "settings": repr(self.settings),
            "strategy": f"{self.strategy.name} {self.strategy.options!r}",
            # Another processor rounds differently: with equal noise, the difference of two answers would be noiseless.
            "machine": " ".join(
                [torch.__version__, get_cpu_capability(), processor_of(self.device), str(torch.get_num_threads())]
            ),
            "frozen": self._frozen_hash,
            "classes": repr(this.known_classes),
            **{name: sha256_tensors(tensors) for name, tensors in start.items()},
        }
        return PrivateSteps(training.privacy, this.data, this.store.ledger, plan, inputs, self.device)

    @cached_property
    def _frozen_hash(self) -> str:
        """SHA-256 of the start values and of every tensor that never changes."""
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.parameters}
        return sha256_tensors({**rest, **self.initial})

    def _lengths(self, this: SiteRound) -> list[int]:
        """Return the number of steps of each of the round's phases."""
        if not this.batches.count(1):
            raise SiteError(
                f"{this.site}: no training image in round {this.round}; lower preprocessing.split, or omit the site"
            )
        training = self.settings.training
        steps = training.steps_per_round or training.local_epochs * this.batches.count(training.batch_size)
        return phase_lengths(self.phases, steps)

    def _train(self, this: SiteRound, steps: LocalSteps) -> Trained:
        self.install(this.received)
        rule = self.strategy.local_rule(self._on_device(this.base), self._on_device(this.rule_state))
        lengths, loss = self._lengths(this), self._loss_over(this.known_classes)
        stream, progress = steps.batches(this.batches), Progress(this.site, sum(lengths), this.on_step)
        shared: Tensors = {}
        moments: dict[str, Tensor] = {}
        with self._training(steps.seed):
            for phase, length in zip(self.phases, lengths, strict=True):
                if phase.personal and not shared:
                    shared = self._tensors()
                    self.install(this.personal or this.received)
                optimiser = self._optimiser(phase, {} if phase.personal else this.moments)
                self._run_phase(phase, islice(stream, length), steps, optimiser, loss, rule, progress)
                if self.settings.training.keep_optimizer and not phase.personal:
                    private = [name for name in phase.trained if name not in self.shapes]
                    moments |= moments_of(optimiser, self.parameters, private)
        if progress.losses and not torch.isfinite(torch.stack(progress.losses)).all():
            raise _diverged(this.site, this.round, "the loss was")
        ends = self._tensors()
        trained = Trained(
            tensors=shared or ends,
            personal=ends if shared else {},
            moments=moments,
            rule_state=_on_cpu(rule.next_state()),
            extra=_on_cpu(rule.extra_tensors()),
            steps=sum(n for phase, n in zip(self.phases, lengths, strict=True) if not phase.personal),
            loss=float(torch.stack(progress.losses).double().mean()) if progress.losses else None,
        )
        for tensors in (trained.tensors, trained.personal, trained.rule_state, trained.extra):
            _check_finite(tensors, this.site, this.round, "the trained tensors are")
        return trained

    @contextmanager
    def _training(self, seed: int) -> Iterator[None]:
        """Run a block in training mode. Dropout uses torch's generator: the seed makes a resumed run draw the same."""
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            with self._half.in_use():
                yield

    def _run_phase(
        self,
        phase: Phase,
        stream: Iterable[Any],
        steps: LocalSteps,
        optimiser: torch.optim.Optimizer,
        loss_of: SegmentationLoss,
        rule: LocalRule,
        on_loss: Callable[[Tensor | None], None],
    ) -> None:
        schedule = warm_up(optimiser, self.settings.training.warmup_steps)
        trained = {name: self.parameters[name] for name in phase.trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)
        step = steps.stepper(optimiser)
        for batch in stream:
            loss = step(self._forward, batch, loss_of, lambda: rule.penalty(trained, phase),
                        lambda: rule.correct(trained, phase))  # fmt: skip
            schedule.step()
            on_loss(loss)

    def _optimiser(self, phase: Phase, moments: Tensors) -> torch.optim.AdamW:
        parameters = {name: self.parameters[name] for name in phase.trained}
        return build_optimiser(parameters, self.decoder, self.settings.training, moments)

    def _loss_over(self, known: Sequence[int]) -> SegmentationLoss:
        return over_known_classes(self.loss, self.model.head, known, self.settings.classes, self.device)

    def _tensors(self) -> dict[str, Tensor]:
        return _on_cpu(self.parameters)

    def _on_device(self, tensors: Tensors) -> Tensors:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    # Answer

    def _update(self, this: SiteRound, trained: Trained) -> tuple[Tensors, Tensors]:
        """Return the update to send, and the rounding error that the next update will include (int8 only)."""
        ends = {**trained.tensors, **trained.extra}
        update = {name: ends[name] - this.base[name] for name in self.shapes}
        if self.settings.wire_dtype != "int8":
            return update, {}
        update = {name: t + this.residual[name] if name in this.residual else t for name, t in update.items()}
        decoded = as_decoded(update, "int8")
        return update, {name: update[name] - decoded[name] for name in update}

    def _answer(
        self, this: SiteRound, update: Tensors, metrics: Mapping[str, float], privacy: PrivacySpent | None = None
    ) -> bytes:
        manifest = Manifest(
            kind="report" if this.final else "update",
            run=self.settings.run,
            round=this.round,
            site=this.site,
            base_hash=hash_tensors(this.base),
            samples=len(this.data.rows("train")),
            dtype=self.settings.wire_dtype,
            relative=False,
            metrics=metrics,
            answered=this.answered,
            privacy=privacy,
        )
        return encode(manifest, update, self.settings.compression)

    def _state_after(self, this: SiteRound, trained: Trained, residual: Tensors) -> SiteState:
        return SiteState(
            round=this.round,
            private={name: tensor for name, tensor in trained.tensors.items() if name not in self.shapes},
            base=this.base,
            residual=residual,
            moments=trained.moments,
            personal=trained.personal,
            rule_state=trained.rule_state,
        )


def mean_dice(
    model: SegmentationModel, forward: Forward, batches: Iterable[Batch], known: Sequence[int], threshold: float
) -> float:
    """Return the mean over images of the mean Dice over the known classes, in [0, 1]; 0 if there is no image."""
    device = next(iter(model.parameters())).device
    channels = torch.tensor([label - 1 for label in known], device=device)
    scores = []
    for batch, logits in predict_logits(model, forward, (batch.to(device) for batch in batches)):
        predicted = predict_masks(logits, model.head, threshold, known)
        dice = dice_per_image(predicted, truth_masks(batch.masks, predicted.shape[1]), batch.valid)
        scores.append(dice.index_select(1, channels).mean(dim=1))
    return float(torch.cat(scores).mean()) if scores else 0.0


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _check_finite(tensors: Tensors, site: str, round_: int, subject: str) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise _diverged(site, round_, subject)


def _diverged(site: str, round_: int, subject: str) -> SiteError:
    return SiteError(
        f"{site}: {subject} not finite in round {round_}; lower training.learning_rate or look at the site's images"
    )
