"""Differential privacy inside a site: DP-SGD over its patients, or images, with Opacus (docs/privacy.md).

Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, algorithm 1. Each step draws every unit with the same
probability, clips each drawn unit's gradient to a norm, adds Gaussian noise to the sum and divides by the expected
number of drawn units. A unit is a subject of the site's training images; each step uses one of its images, at random.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsca_pipeline.compute import autocast
from fedsca_pipeline.config import PrivacyConfig
from fedsca_pipeline.data.arrays import Arrays
from fedsca_pipeline.errors import SiteError
from fedsca_pipeline.federation.messages.manifest import PrivacyLevel, PrivacySpent
from fedsca_pipeline.federation.site.batches import SiteBatches
from fedsca_pipeline.federation.site.losses import SegmentationLoss
from fedsca_pipeline.federation.site.privacy.accountant import epsilon_of, noise_multiplier
from fedsca_pipeline.federation.site.privacy.ledger import Entry, PrivacyLedger, with_entry
from fedsca_pipeline.federation.site.steps import Correction, Penalty, Step
from fedsca_pipeline.model.batch import Batch

logger = logging.getLogger(__name__)

_CHUNK = 64


@dataclass(frozen=True)
class Units:
    """The units that the guarantee protects: the rows of each, and the guarantee's level."""

    rows: tuple[tuple[int, ...], ...]
    level: PrivacyLevel

    @classmethod
    def of(cls, data: Arrays) -> Units:
        """Return the subjects of the training images as units.

        The level is image-level if no subject has two image files: the site may then have named no patients.
        """
        rows: dict[str, list[int]] = defaultdict(list)
        images: dict[str, set[str]] = defaultdict(set)
        for row, subject, image in zip(data.rows("train"), data.subjects("train"), data.images("train"), strict=True):
            rows[subject].append(int(row))
            images[subject].add(image)
        several = any(len(files) > 1 for files in images.values())
        return cls(tuple(tuple(found) for found in rows.values()), "patient-level" if several else "image-level")


def draw(units: Sequence[Sequence[int]], rate: float, draws: np.random.Generator) -> list[int]:
    """Return the rows of one step: each unit gives one of its rows with probability ``rate``. Can be empty."""
    drawn = np.flatnonzero(draws.random(len(units)) < rate).tolist()
    return [units[unit][int(draws.integers(len(units[unit])))] for unit in drawn]


def data_digest(data: Arrays) -> str:
    """Return 64 hex digits over the training images, masks and subjects."""
    digest = hashlib.sha256(json.dumps(data.subjects("train")).encode())
    rows = data.rows("train")
    for start in range(0, len(rows), _CHUNK):
        for part in data.batch(rows[start : start + _CHUNK]):
            # hashlib takes an array's buffer; its stub does not know arrays.
            digest.update(np.ascontiguousarray(part))  # type: ignore[arg-type]
    return digest.hexdigest()


@dataclass(frozen=True)
class RoundPlan:
    """The size of a private round: ``steps`` of ``batch_size`` units on average; epsilon is spread over ``rounds``."""

    site: str
    run: str
    round: int
    steps: int
    rounds: int
    batch_size: int


class PrivateSteps:
    """The differentially private local steps of one site in one round.

    Args:
        config: with an epsilon.
        data: of the site.
        ledger: of the site.
        plan: the round's size.
        inputs: everything that decides the round's answer except data and noise multiplier: equal inputs give equal
            noise.
        device: of the model.

    Raises:
        SiteError: the round would cost more than the run or the site's owner allows, or the ledger is damaged.
        ConfigError: the run's epsilon is too small for any noise.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        data: Arrays,
        ledger: PrivacyLedger,
        plan: RoundPlan,
        inputs: Mapping[str, str],
        device: torch.device,
    ) -> None:
        if config.epsilon is None:
            raise ValueError("differential privacy needs an epsilon")
        self._config, self._ledger, self._site, self._device = config, ledger, plan.site, device
        self.units = Units.of(data)
        self.rate = min(1.0, plan.batch_size / len(self.units.rows))
        noise = noise_multiplier(config.epsilon, config.delta, self.rate, plan.rounds * plan.steps)
        # With the same draws and another multiplier, the difference of two answers would reveal the gradients.
        decided = [dict(inputs), data_digest(data), noise]
        start = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
        self.entry = Entry(plan.run, plan.round, ledger.keyed(start), plan.steps, self.rate, noise)
        self.epsilon = self._affordable_epsilon()
        self._sampling, self._noise = (ledger.draws(start, purpose) for purpose in ("sampling", "noise"))
        self.seed = int(ledger.draws(start, "dropout").integers(2**32))

    def _affordable_epsilon(self) -> float:
        """Return the epsilon of all the site's answers, this round included; SiteError if it is above a limit."""
        config, bound = self._config, self._ledger.bound
        entries = with_entry(self._ledger.entries(), self.entry)
        total = epsilon_of(entries, config.delta)
        limits = [
            ("training.privacy.epsilon", config.epsilon, [e for e in entries if e.run == self.entry.run], config.delta),
            ("training.privacy.budget", config.budget, entries, config.delta),
            *([("the site's own privacy.epsilon", bound.epsilon, entries, bound.delta)] if bound else []),
        ]
        for name, limit, counted, delta in limits:
            if limit is not None and (spent := epsilon_of(counted, delta)) > limit:
                raise SiteError(
                    f"{self._site}: round {self.entry.round} was refused: with it epsilon would be {spent:.2f} at "
                    f"delta {delta:g}, and {name} is {limit:g}; nothing was trained"
                )
        return total

    def batches(self, batches: SiteBatches) -> Iterator[Sequence[Batch]]:
        """Yield the images of each step, one batch per image, without end; their number varies and can be 0."""
        while True:
            rows = draw(self.units.rows, self.rate, self._sampling)
            yield [batches.augmented(row, int(self._sampling.integers(2**32))) for row in rows]

    def stepper(self, optimiser: torch.optim.Optimizer) -> Step:
        """Return the step that gives ``optimiser`` noised gradients; its loss stays private."""
        from fedsca_pipeline.federation.site.privacy.optimizer import NoisyOptimizer

        noisy = NoisyOptimizer(
            optimiser,
            self._noise,
            noise_multiplier=self.entry.noise,
            max_grad_norm=self._config.clip,
            expected_batch_size=self.rate * len(self.units.rows),
        )

        def step(
            forward: Callable[[Batch], Tensor],
            images: Sequence[Batch],
            loss_of: SegmentationLoss,
            penalty: Penalty,
            correct: Correction,
        ) -> None:
            noisy.zero_grad(set_to_none=True)
            for image in images:
                gradients = unit_gradient(forward, image.to(self._device), loss_of, noisy.params)
                for parameter, gradient in zip(noisy.params, gradients, strict=True):
                    # Opacus reads grad_sample, an attribute it adds to parameters.
                    parameter.grad_sample = gradient.unsqueeze(0)  # type: ignore[attr-defined]
                noisy.signal_skip_step()
                noisy.pre_step()
                noisy.zero_grad(set_to_none=True)
            for parameter in noisy.params:
                # As above: an attribute that Opacus adds.
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
            noisy.pre_step()
            # From here on, only noised gradients are used, which costs no privacy.
            _add_gradient(penalty(), noisy.params)
            correct()
            optimiser.step()

        return step

    def record(self) -> PrivacySpent:
        """Record the round in the site's privacy ledger, and return what the site has spent."""
        self._ledger.record(self.entry)
        logger.info(
            "%s: %s epsilon %.2f at delta %g with round %d (noise multiplier %.3f)",
            self._site, self.units.level, self.epsilon, self._config.delta, self.entry.round, self.entry.noise,
        )  # fmt: skip
        return PrivacySpent(self.units.level, self.epsilon, self._config.delta, self.entry.noise)


def unit_gradient(
    forward: Callable[[Batch], Tensor], image: Batch, loss_of: SegmentationLoss, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradient of one image's loss by each parameter; all zeros if any value is not finite.

    One pass per image: the decoder uses its tokens without calling a module, so Opacus' hooks do not see them.
    """
    with autocast(image.inputs.device):
        logits = forward(image)
    gradients = torch.autograd.grad(loss_of(logits, image.masks, image.valid), parameters, materialize_grads=True)
    # An image that overflows would make the whole sum NaN, and so reveal that it is there. The host does not read
    # whether it does: it would wait for the device at every image.
    finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
    return [torch.where(finite, gradient, 0.0) for gradient in gradients]


def _add_gradient(penalty: Tensor | None, parameters: Sequence[Tensor]) -> None:
    if penalty is None:
        return
    gradients = torch.autograd.grad(penalty, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad += gradient  # type: ignore[operator]
