"""One site's work in one round: receive, validate, train, reply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

from fedsca_pipeline.data.arrays import Arrays, known_classes
from fedsca_pipeline.errors import SiteError
from fedsca_pipeline.federation.messages.codec import TRAVELLING, Message, as_decoded, check, decode, encode, most_bytes
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.site.batches import AS_IT_STANDS, VIEWS, SiteBatches, build_augmentation
from fedsca_pipeline.federation.site.losses import SegmentationLoss, among, build_loss
from fedsca_pipeline.federation.site.prefix import FeatureCache, SplitModel
from fedsca_pipeline.federation.site.privacy.steps import PrivateSteps
from fedsca_pipeline.federation.site.steps import LocalSettings, PlainSteps, StepCallback, _Progress, warm_up
from fedsca_pipeline.federation.site.store import SiteState, SiteStore, Snapshot
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.metrics.images import dice_per_image
from fedsca_pipeline.model.batch import Batch
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.heads import predict_masks, truth_masks
from fedsca_pipeline.model.inference import Forward, predict_logits
from fedsca_pipeline.model.layout import TensorLayout, hash_tensors, sha256_tensors

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]


_NO_FILE = Path("no file")


@dataclass(frozen=True)
class _Trained:
    """What one round's local training left: by name, fp32, on the CPU.

    ``tensors``: of the model that is shared in part. ``personal``: of the site's own copy, where there is one. ``kept``
    and ``carried``: the local rule's. ``steps`` are those behind ``tensors``; ``loss`` is the mean over all steps, None
    where it stays private.
    """

    tensors: Tensors
    personal: Tensors
    moments: Tensors
    kept: Tensors
    carried: Tensors
    steps: int
    loss: float | None


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
        self.layout = layout
        self.strategy = strategy
        self.settings = settings
        self.shared = strategy.shared()
        self.phases = strategy.phases()
        self.shapes = strategy.wire_shapes()
        self.decoder = frozenset(layout.decoder)
        trained = frozenset(strategy.trained())
        self.parameters = {name: p for name, p in model.named_parameters() if name in trained}
        self.initial = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.loss: SegmentationLoss = build_loss(model.head, settings.training.dice_weight)
        self.augmentation = build_augmentation(settings.training.augment)
        self.device = next(iter(model.parameters())).device
        self.split = SplitModel(model, trained)

    def work(
        self, payload: bytes, round_: int, site: str, data: Arrays, store: SiteStore, on_step: StepCallback
    ) -> bytes:
        """Answer one payload, the same way however often it comes.

        Installs the aggregate, validates the model of the round before (keeping the best), and, unless the payload is
        ``final``, trains and returns the update. Validation Dice travels as ``dice_validation``, that right after local
        training as ``dice_local``.

        Raises:
            MessageError: the payload is not the one this site expects.
            SiteError: the loss is not finite, or the round would cost more privacy than is left.
        """
        started = time.perf_counter()
        message = decode(payload, max_bytes=most_bytes(self.shapes))
        answered = message.manifest.answered
        state = store.state_at(answered)
        base, final = self._receive(message, round_, site, state)
        if answered and (state is None or state.round != answered):
            logger.warning("%s: its state of round %d is gone; it goes on from what it has", site, answered)
        private = dict(state.private) if state else {n: t for n, t in self.initial.items() if n not in self.shapes}
        received = {**private, **base}
        self.install({**received, **(state.personal if state else {})})
        batches, known = self._batches(data, store), known_classes(data, self.settings.classes)
        metrics = {}
        if final or self._validates(round_ - 1):
            metrics["dice_validation"] = self._validate(batches, known)
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
            answered=answered,
        )
        if final:
            return encode(reply, {}, self.settings.compression)
        self.install(received)
        lengths = self._lengths(batches, site, round_)
        way = self._way(site, round_, base, state, data, store, sum(lengths))
        # Before it trains: a failure, too, would tell something of the training.
        spent = way.settle()
        trained = self._train(batches, known, site, round_, base, state, on_step, lengths, way)
        for tensors in (trained.tensors, trained.personal, trained.kept, trained.carried):
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise _diverged(site, round_, "the trained tensors are")
        ends = {**trained.tensors, **trained.carried}
        sent, residual = self._round_update({name: ends[name] - base[name] for name in self.shapes}, state)
        if self.settings.validate_after_training and self._validates(round_):
            metrics["dice_local"] = self._validate(batches, known)
        metrics |= {} if trained.loss is None else {"loss": trained.loss}
        metrics |= {"steps": trained.steps, "seconds": time.perf_counter() - started}
        answer = encode(replace(reply, metrics=metrics, privacy=spent), sent, self.settings.compression)
        own = {name: tensor for name, tensor in trained.tensors.items() if name not in self.shapes}
        # Last, so that a state is only ever one whose update can be sent.
        kept = SiteState(round_, own, base, residual, trained.moments, trained.personal, trained.kept)
        store.save_state(kept, answered)
        return answer

    def tune(
        self,
        data: Arrays,
        tensors: Tensors,
        names: Collection[str],
        steps: int,
        *,
        site: str,
    ) -> dict[str, Tensor]:
        """Return ``tensors``, a whole model's, after ``steps`` local steps of ``names`` on the data's training images.

        That is how an unseen site makes a federation's model its own (docs/comparison.md). No strategy has a say in it.

        Raises:
            SiteError: the loss is not finite.
        """
        self.install(tensors)
        phase = Phase(tuple(name for name in self.parameters if name in names))
        batches = SiteBatches(data, self._embed, self.augmentation, FeatureCache(_NO_FILE, (), (), 0))
        way = PlainSteps(self.settings, site, round_=0, device=self.device)
        stream = islice(way.batches(batches), steps)
        loss = self._loss_among(known_classes(data, self.settings.classes))
        with self._training(way.seed):
            self._run_phase(phase, stream, way, self._optimiser(phase, {}), loss, LocalRule({}, {}), lambda _: None)
        found = self._tensors()
        if not all(tensor.isfinite().all() for tensor in found.values()):
            raise _diverged(site, 0, "the tuned tensors are")
        return found

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
            dtypes=TRAVELLING[self.settings.wire_dtype],
        )
        if manifest.relative and state is None:
            raise SiteError(f"{site}: round {round_} came as a difference, but this site holds nothing to add it to")
        base = message.tensors
        if manifest.relative and state is not None:
            base = {name: state.base[name] + t for name, t in message.tensors.items()}
        return base, manifest.kind == "final"

    def install(self, tensors: Tensors) -> None:
        """Copy tensors into the model; names that are not among its trained tensors are passed over."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if name in tensors:
                    parameter.copy_(tensors[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def _validates(self, round_: int) -> bool:
        return round_ % self.settings.validate_every == 0

    def _keep(self, store: SiteStore, snapshot: Snapshot, *, final: bool) -> None:
        if snapshot.dice > store.best_dice(before=snapshot.round):
            store.save_snapshot("best", snapshot)
        if final:
            store.save_snapshot("last", snapshot)

    def _batches(self, data: Arrays, store: SiteStore) -> SiteBatches:
        validation = [(int(row), AS_IT_STANDS) for row in data.rows("validation")]
        # Jittered intensities never come twice, and are nobody's view.
        views = () if self.settings.training.augment.intensity else VIEWS
        training = [(int(row), view) for row in data.rows("train") for view in views]
        room = self.settings.cache_bytes if self.split.has_prefix else 0
        cache = FeatureCache(store.feature_cache, [*validation, *training], self.split.feature_shape, room)
        return SiteBatches(data, self._embed, self.augmentation, cache)

    def _embed(self, images: Tensor, valid: Tensor) -> Tensor:
        return self.split.features(images.to(self.device), valid.to(self.device))

    def _forward(self, batch: Batch) -> Tensor:
        return self.split.logits(batch.inputs)

    def _validate(self, batches: SiteBatches, known: Sequence[int]) -> float:
        validation = batches.plain("validation", self.settings.evaluation_batch)
        return mean_dice(self.model, self._forward, validation, known, self.settings.threshold)

    def _loss_among(self, known: Sequence[int]) -> SegmentationLoss:
        return among(self.loss, self.model.head, known, self.settings.classes)

    def _train(
        self,
        batches: SiteBatches,
        known: Sequence[int],
        site: str,
        round_: int,
        base: Tensors,
        state: SiteState | None,
        on_step: StepCallback,
        lengths: Sequence[int],
        way: PlainSteps | PrivateSteps,
    ) -> _Trained:
        rule = self.strategy.local_rule(self._here(base), self._here(state.kept if state else {}))
        stream, progress = way.batches(batches), _Progress(site, sum(lengths), on_step)
        loss, personal = self._loss_among(known), state.personal if state else {}
        shared: Tensors = {}
        moments: dict[str, Tensor] = {}
        with self._training(way.seed):
            for phase, length in zip(self.phases, lengths, strict=True):
                if phase.personal and not shared:
                    shared = self._tensors()
                    self.install(personal or self._received(base, state))
                optimiser = self._optimiser(phase, state.moments if state and not phase.personal else {})
                self._run_phase(phase, islice(stream, length), way, optimiser, loss, rule, progress)
                if not phase.personal:
                    moments |= self._moments(phase, optimiser)
        if progress.losses and not torch.isfinite(torch.stack(progress.losses)).all():
            raise _diverged(site, round_, "the loss was")
        ends = self._tensors()
        return _Trained(
            tensors=shared or ends,
            personal=ends if shared else {},
            moments=moments,
            kept=_on_cpu(rule.next_state()),
            carried=_on_cpu(rule.extra_tensors()),
            steps=sum(n for phase, n in zip(self.phases, lengths, strict=True) if not phase.personal),
            loss=float(torch.stack(progress.losses).double().mean()) if progress.losses else None,
        )

    @contextmanager
    def _training(self, seed: int) -> Iterator[None]:
        """Dropout draws from torch's own generator; seeded here, it draws the same again after a resume."""
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _run_phase(
        self,
        phase: Phase,
        stream: Iterable[Any],
        way: PlainSteps | PrivateSteps,
        optimiser: torch.optim.Optimizer,
        loss_of: SegmentationLoss,
        rule: LocalRule,
        told: Callable[[Tensor | None], None],
    ) -> None:
        schedule = warm_up(optimiser, self.settings.training.warmup_steps)
        trained = {name: self.parameters[name] for name in phase.trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in trained)
        step = way.stepper(optimiser)
        for batch in stream:
            loss = step(self._forward, batch, loss_of, lambda: rule.penalty(trained, phase),
                        lambda: rule.correct(trained, phase))  # fmt: skip
            schedule.step()
            told(loss)

    def _way(
        self,
        site: str,
        round_: int,
        base: Tensors,
        state: SiteState | None,
        data: Arrays,
        store: SiteStore,
        steps: int,
    ) -> PlainSteps | PrivateSteps:
        """Return how this round's local steps are made."""
        training = self.settings.training
        if training.privacy.epsilon is None:
            return PlainSteps(self.settings, site, round_, self.device)
        if store.vault is None:
            raise SiteError(f"{site}: training.privacy needs a place for the site's secret, and it has none")
        start = {"received": base, **(state.tensors() if state else {})}
        place = {
            "site": site,
            "round": str(round_),
            "settings": repr(self.settings),
            "strategy": f"{self.strategy.name} {self.strategy.options!r}",
            # Another processor rounds otherwise: with the same noise, two answers would differ by that alone.
            "machine": f"{torch.__version__} {get_cpu_capability()} {self.device} {torch.get_num_threads()}",
            "frozen": self._frozen,
            "classes": repr(known_classes(data, self.settings.classes)),
            **{name: sha256_tensors(tensors) for name, tensors in start.items()},
        }
        return PrivateSteps(
            training.privacy,
            data,
            store.vault,
            place,
            run=self.settings.run,
            round_=round_,
            steps=steps,
            rounds=self.settings.rounds,
            batch_size=training.batch_size,
            site=site,
            device=self.device,
        )

    @cached_property
    def _frozen(self) -> str:
        """SHA-256 of the start values and of all that never changes."""
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if name not in self.parameters}
        return sha256_tensors({**rest, **self.initial})

    def _lengths(self, batches: SiteBatches, site: str, round_: int) -> list[int]:
        """Return the steps of each of the round's phases."""
        if not batches.count(1):
            raise SiteError(f"{site}: no training image in round {round_}; lower preprocessing.split, or leave it out")
        return phase_lengths(self.phases, self._steps(batches))

    def _steps(self, batches: SiteBatches) -> int:
        training = self.settings.training
        return training.steps_per_round or training.local_epochs * batches.count(training.batch_size)

    def _here(self, tensors: Tensors) -> Tensors:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _received(self, base: Tensors, state: SiteState | None) -> Tensors:
        return {**self.initial, **(state.private if state else {}), **base}

    def _optimiser(self, phase: Phase, moments: Tensors) -> torch.optim.AdamW:
        training = self.settings.training
        rates = {False: training.learning_rate, True: training.learning_rate * training.decoder_factor}
        groups = [
            {"params": [self.parameters[n] for n in phase.trained if (n in self.decoder) == in_decoder], "lr": rate}
            for in_decoder, rate in rates.items()
        ]
        optimiser = torch.optim.AdamW(
            [g for g in groups if g["params"]], weight_decay=training.weight_decay, fused=True
        )
        for name in phase.trained:
            if f"{name}/step" in moments:
                parameter = self.parameters[name]
                optimiser.state[parameter] = {
                    key: moments[f"{name}/{key}"].clone().to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return optimiser

    def _moments(self, phase: Phase, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
        if not self.settings.training.keep_optimizer:
            return {}
        return {
            f"{name}/{key}": value.detach().cpu().clone()
            for name in phase.trained
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


def phase_lengths(phases: Sequence[Phase], steps: int) -> list[int]:
    """Return the steps of each phase, at least one; but for that, together they are the sum of shares of ``steps``."""
    ends = [0, *(round(share * steps) for share in accumulate(phase.share for phase in phases))]
    return [max(1, end - start) for start, end in pairwise(ends)]


def _on_cpu(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _diverged(site: str, round_: int, what: str) -> SiteError:
    return SiteError(f"{site}: {what} not finite in round {round_}; lower training.learning_rate or look at its images")


def mean_dice(
    model: SegmentationModel, forward: Forward, batches: Iterable[Batch], known: Sequence[int], threshold: float
) -> float:
    """Return the mean over images of the mean Dice over the known classes, in [0, 1]; 0 where there is no image."""
    device = next(iter(model.parameters())).device
    channels = [label - 1 for label in known]
    scores = []
    for batch, logits in predict_logits(model, forward, (batch.to(device) for batch in batches)):
        predicted = predict_masks(logits, model.head, threshold, known)
        dice = dice_per_image(predicted, truth_masks(batch.masks, predicted.shape[1]), batch.valid)
        scores.append(dice[:, channels].mean(dim=1))
    return float(torch.cat(scores).mean()) if scores else 0.0
