"""Differential privacy inside a site: DP-SGD over its patients, or images, with Opacus (docs/privacy.md).

Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016. Each step draws every unit with the same probability,
cuts the gradient of each drawn one to a norm, adds Gaussian noise to the sum and divides by the expected number drawn.
A unit is a subject of the site's training images, and gives one of its images, drawn anew in each step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

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
from fedsca_pipeline.federation.site.privacy.ledger import Entry, Vault, with_entry
from fedsca_pipeline.model.batch import Batch

logger = logging.getLogger(__name__)

_CHUNK = 64


@dataclass(frozen=True)
class Units:
    """Whom the guarantee is for: the rows of each unit, and what the guarantee is called."""

    rows: tuple[tuple[int, ...], ...]
    level: PrivacyLevel

    @classmethod
    def of(cls, data: Arrays) -> Units:
        """Return the subjects of the training images.

        It is image-level where no subject has two image files, for then nobody may have said who is who.
        """
        rows: dict[str, list[int]] = defaultdict(list)
        images: dict[str, set[str]] = defaultdict(set)
        for row, subject, image in zip(data.rows("train"), data.subjects("train"), data.images("train"), strict=True):
            rows[subject].append(int(row))
            images[subject].add(image)
        several = any(len(files) > 1 for files in images.values())
        return cls(tuple(tuple(found) for found in rows.values()), "patient-level" if several else "image-level")


def draw(units: Sequence[Sequence[int]], rate: float, draws: np.random.Generator) -> list[int]:
    """Return the rows of one step: of each unit, with probability ``rate``, one of its rows. May be none."""
    drawn = np.flatnonzero(draws.random(len(units)) < rate)
    return [units[unit][draws.integers(len(units[unit]))] for unit in drawn]


@cache
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the least noise, in clip norms, whose ``steps`` cost at most ``epsilon`` at ``delta``: Opacus' answer."""
    from opacus.accountants.utils import get_noise_multiplier

    with _orders_as_they_are():
        found = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp"
        )
    return float(found)


def epsilon_of(entries: Sequence[Entry], delta: float) -> float:
    """Return the epsilon of all these answers together, by Opacus' Renyi accountant; 0 for none."""
    from opacus.accountants import RDPAccountant

    if not entries:
        return 0.0
    steps: Counter[tuple[float, float]] = Counter()
    for entry in entries:
        steps[entry.noise, entry.rate] += entry.steps
    accountant = RDPAccountant()
    accountant.history = [(noise, rate, count) for (noise, rate), count in steps.items()]
    with _orders_as_they_are():
        return float(accountant.get_epsilon(delta))


@contextmanager
def _orders_as_they_are() -> Iterator[None]:
    """Without Opacus' warning that an order beyond the ones it tries might give a lower epsilon: its own is a bound."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield


def data_digest(data: Arrays) -> str:
    """Return 64 hex digits over the training images, masks and subjects."""
    digest = hashlib.sha256(json.dumps(data.subjects("train")).encode())
    rows = data.rows("train")
    for start in range(0, len(rows), _CHUNK):
        for part in data.batch(rows[start : start + _CHUNK]):
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()


class PrivateSteps:
    """The local steps of one site in one round, differentially private.

    Args:
        config: with an epsilon.
        data: of the site.
        vault: of the site.
        place: all that decides the round but for data and noise: the same place is the same answer.
        run: its name.
        round_: of the run.
        steps: of this round.
        rounds: of the run; epsilon is spread over them.
        batch_size: units expected in a step.
        site: its name, for errors.
        device: of the model.

    Raises:
        SiteError: the round would cost more than the run or the site's owner allows, or the vault is damaged.
    """

    def __init__(
        self,
        config: PrivacyConfig,
        data: Arrays,
        vault: Vault,
        place: Mapping[str, str],
        *,
        run: str,
        round_: int,
        steps: int,
        rounds: int,
        batch_size: int,
        site: str,
        device: torch.device,
    ) -> None:
        if config.epsilon is None:
            raise ValueError("there is no privacy without an epsilon")
        self._config, self._vault, self._site, self._device = config, vault, site, device
        self.units = Units.of(data)
        self.rate = min(1.0, batch_size / len(self.units.rows))
        noise = noise_multiplier(config.epsilon, config.delta, self.rate, rounds * steps)
        start = hashlib.sha256(json.dumps([dict(place), data_digest(data)], sort_keys=True).encode()).hexdigest()
        self.entry = Entry(run, round_, vault.keyed(start), steps, self.rate, noise)
        self.epsilon = self._affordable()
        self._sampling, self._noise = (vault.draws(start, purpose) for purpose in ("sampling", "noise"))
        self.seed = int(vault.draws(start, "dropout").integers(2**32))

    def _affordable(self) -> float:
        """Return the epsilon of all that the site has answered, this round included, or refuse it."""
        config, bound = self._config, self._vault.bound
        entries = with_entry(self._vault.entries(), self.entry)
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
        """Yield, without end, the images of a step, each a batch of its own; often fewer or more, or none."""
        while True:
            rows = draw(self.units.rows, self.rate, self._sampling)
            yield [batches.augmented(row, int(self._sampling.integers(2**32))) for row in rows]

    def stepper(self, optimiser: torch.optim.Optimizer) -> Callable[..., None]:
        """Return the step with an optimiser of gradients, which it hands noised ones."""
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
            penalty: Callable[[], Tensor | None],
            correct: Callable[[], None],
        ) -> None:
            noisy.zero_grad(set_to_none=True)
            for image in images:
                gradients = unit_gradient(forward, image.to(self._device), loss_of, noisy.params)
                for parameter, gradient in zip(noisy.params, gradients, strict=True):
                    parameter.grad_sample = gradient.unsqueeze(0)
                noisy.signal_skip_step()
                noisy.pre_step()
                noisy.zero_grad(set_to_none=True)
            for parameter in noisy.params:
                parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
            noisy.pre_step()
            # What follows sees noised gradients only: it costs no privacy.
            _add_gradient(penalty(), noisy.params)
            correct()
            optimiser.step()

        return step

    def settle(self) -> PrivacySpent:
        """Enter the round in the site's ledger, and return what to tell of it."""
        self._vault.record(self.entry)
        logger.info(
            "%s: %s epsilon %.2f at delta %g with round %d (noise multiplier %.3f)",
            self._site, self.units.level, self.epsilon, self._config.delta, self.entry.round, self.entry.noise,
        )  # fmt: skip
        return PrivacySpent(self.units.level, self.epsilon, self._config.delta, self.entry.noise)


def unit_gradient(
    forward: Callable[[Batch], Tensor], image: Batch, loss_of: SegmentationLoss, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradient of one image's loss by each parameter; all zero where any value is not finite.

    A pass an image: the decoder uses its tokens without calling a module, which Opacus' hooks cannot see.
    """
    with autocast(image.inputs.device):
        logits = forward(image)
    found = torch.autograd.grad(loss_of(logits, image.masks, image.valid), parameters, materialize_grads=True)
    # One image that overflows would make everything NaN, and that would tell that it is there.
    return list(found) if all(gradient.isfinite().all() for gradient in found) else [torch.zeros_like(g) for g in found]


def _add_gradient(penalty: Tensor | None, parameters: Sequence[Tensor]) -> None:
    if penalty is None:
        return
    found = torch.autograd.grad(penalty, parameters, materialize_grads=True)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad += gradient
