"""The epsilon that a site's answers cost together, and the noise that keeps a run within an epsilon (docs/privacy.md).

Opacus is imported only with differential privacy, because importing it takes seconds.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.site.privacy.ledger import Entry

# Beyond these, Opacus' PRV accountant takes gigabytes, or overflows.
_PRV_EPSILON, _PRV_STEPS = 64.0, 1_000_000
# Its Fourier transforms round by up to 2e-16 per step, and it allows for a thousandth of delta. With still smaller
# deltas it returns less than the true epsilon.
_PRV_DELTA_PER_STEP = 1e-12
# The error that the PRV accountant adds. Beyond these steps it grows with their square root, and the time no longer.
_PRV_ERROR, _PRECISE_STEPS = 0.01, 10_000
# The Renyi accountant is quick at whole orders. Any choice of orders gives an upper bound.
_WHOLE_ORDERS = range(2, 64)
_MAX_NOISE = 1e6
# A thousandth of a run's epsilon is left for rounding, so that none of its rounds is refused.
_AIM = 0.999
# Precision of the noise's logarithm.
_PRECISION = 1e-4

# Noise multiplier, sampling rate and number of steps.
_Steps = tuple[float, float, int]


def epsilon_of(entries: Sequence[Entry], delta: float) -> float:
    """Return an upper bound of the epsilon of these answers together, at least 0.01; 0 for no answer.

    Neighbouring data sets differ by one unit, added or removed. The PRV accountant (Gopi, Lee and Wutschitz, 2021)
    adds 0.01 to 0.02 to the true value, ten times as much at 1,000,000 steps. It counts while ``delta`` is at least
    1e-12 times the number of steps, the steps are at most 1,000,000, and the Renyi accountant (Mironov, 2017) finds at
    most 64 at whole orders. Otherwise, the Renyi accountant counts.
    """
    steps: Counter[tuple[float, float]] = Counter()
    for entry in entries:
        steps[entry.noise, entry.rate] += entry.steps
    history = tuple((noise, rate, count) for (noise, rate), count in sorted(steps.items()))
    return _epsilon(history, delta) if history else 0.0


@cache
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """Return the noise, in clip norms, whose ``steps`` cost between 0.99 and 1 times ``epsilon``, as ``epsilon_of``.

    It costs less only if ``epsilon`` lies where one accountant follows the other, and jumps.

    Raises:
        ConfigError: no noise up to 1,000,000 clip norms is enough.
    """
    from scipy.optimize import brentq

    def excess(log_noise: float) -> float:
        return math.log(_epsilon(((math.exp(log_noise), rate, steps),), delta) / (_AIM * epsilon))

    # The noise of the classic Gaussian mechanism, times the rate.
    low = high = math.log(rate * math.sqrt(2 * steps * math.log(1.25 / delta)) / epsilon)
    while excess(high) > 0:
        if high > math.log(_MAX_NOISE):
            raise ConfigError(
                f"training.privacy.epsilon: {epsilon:g} at delta {delta:g} is too small for a run of {steps} steps "
                "with any noise; raise it, or train fewer rounds"
            )
        high += math.log(2)
    while excess(low) <= 0:
        low -= math.log(2)
    log_noise = float(brentq(excess, low, high, xtol=_PRECISION))
    while excess(log_noise) > 0:
        log_noise += _PRECISION
    return math.exp(log_noise)


# A round asks for the same answers several times: for the run, for a budget, for the owner's bound, and to report.
@lru_cache(maxsize=64)
def _epsilon(history: tuple[_Steps, ...], delta: float) -> float:
    steps = sum(count for *_, count in history)
    with _silent():
        if (
            steps <= min(_PRV_STEPS, delta / _PRV_DELTA_PER_STEP)
            and _renyi_epsilon(history, delta, _WHOLE_ORDERS) <= _PRV_EPSILON
        ):
            epsilon = _prv_epsilon(history, delta)
        else:
            epsilon = _renyi_epsilon(history, delta)
    # With a large delta, both accountants can return a value below 0.
    return max(_PRV_ERROR, epsilon)


def _renyi_epsilon(history: Sequence[_Steps], delta: float, orders: Sequence[float] | None = None) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(history)
    return float(accountant.get_epsilon(delta, alphas=orders))


def _prv_epsilon(history: Sequence[_Steps], delta: float) -> float:
    """Return what Opacus' PRVAccountant returns, in a twentieth of the time.

    Of the losses, it computes the same range, but from the whole orders of the Renyi accountant only.
    """
    from opacus.accountants.analysis import prv

    counts = [count for *_, count in history]
    steps, delta_error = sum(counts), delta / 1000
    error = _PRV_ERROR * math.sqrt(max(1.0, steps / _PRECISE_STEPS))
    largest = 3 + max(
        error,
        _renyi_epsilon(history, delta_error / 4, _WHOLE_ORDERS),
        *(_renyi_epsilon([(noise, rate, 1)], delta_error / (8 * steps), _WHOLE_ORDERS) for noise, rate, _ in history),
    )
    domain = prv.Domain.create_aligned(-largest, largest, error / math.sqrt(steps * math.log(12 / delta_error) / 2))
    losses = [prv.PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in history]
    discrete = [
        prv.discretize(prv.TruncatedPrivacyRandomVariable(loss, domain.t_min, domain.t_max), domain) for loss in losses
    ]
    _, _, upper = prv.compose_heterogeneous(discrete, counts).compute_epsilon(delta, delta_error, error)
    return float(upper)


@contextmanager
def _silent() -> Iterator[None]:
    """Silence Opacus' hint that other orders might give a lower epsilon, and numpy's that log(0) is -inf at rate 1."""
    import numpy as np

    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", message="Optimal order is the")
        yield
