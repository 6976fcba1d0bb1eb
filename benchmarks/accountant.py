"""Compare the accountant of differential privacy with Opacus' Renyi and PRV accountants: epsilon, noise and time.

    python benchmarks/accountant.py

The first table has the trainings of ``benchmarks/privacy.py`` at a site of 32 images: 8 of them per step on average, 4
steps per round, 8 rounds, delta 1e-5. No model is trained. Times are CPU seconds of one computation, relative to those
of Opacus' accountants in the same run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
from measure import Ratio, in_turn, ratios, report
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.accountant import IAccountant
from opacus.accountants.utils import get_noise_multiplier
from rich.console import Console
from rich.table import Table

from fedsca_pipeline.federation.site.privacy import accountant
from fedsca_pipeline.federation.site.privacy.ledger import Entry

EPSILONS, DELTA, RATE, ROUNDS, STEPS = (2.0, 8.0, 32.0), 1e-5, 0.25, 8, 4
REPETITIONS = 9


def main() -> None:
    """Print both tables and write ``results/accountant.json``."""
    warnings.filterwarnings("ignore", message="Optimal order is the")
    np.seterr(divide="ignore")
    table = Table(
        "epsilon", "noise, Renyi", "its epsilon now", "noise now", "ratio of noise", title="the same training"
    )
    rows = []
    for epsilon in EPSILONS:
        before = get_noise_multiplier(
            target_epsilon=epsilon, target_delta=DELTA, sample_rate=RATE, steps=ROUNDS * STEPS, accountant="rdp"
        )
        spent = accountant.epsilon_of(_rounds(before), DELTA)
        now = accountant.noise_multiplier(epsilon, DELTA, RATE, ROUNDS * STEPS)
        rows.append({"epsilon": epsilon, "renyi_noise": before, "epsilon_of_renyi_noise": spent, "noise": now})
        table.add_row(f"{epsilon:g}", f"{before:.3f}", f"{spent:.2f}", f"{now:.3f}", f"{now / before:.3f}")
    Console().print(table)
    noise = rows[1]["noise"]
    measured = in_turn(
        {
            "ours": partial(_seconds, partial(_ours, _rounds(noise))),
            "prv": partial(_seconds, partial(_opacus, PRVAccountant(), noise)),
            "renyi": partial(_seconds, partial(_opacus, RDPAccountant(), noise)),
            "noise": partial(_seconds, _calibrate),
        },
        REPETITIONS,
    )
    findings = [
        Ratio(
            "epsilon of a ledger of one run", "Opacus' PRV accountant", ratios(measured["ours"], measured["prv"]), 0.5
        ),
        Ratio("the same", "Opacus' Renyi accountant", ratios(measured["ours"], measured["renyi"]), 1.0),
        Ratio(
            "noise of a run, once per site", "Opacus' PRV accountant", ratios(measured["noise"], measured["prv"]), 4.0
        ),
        Ratio("epsilon of a ledger of one run", "CPU seconds", measured["ours"], 0.1),
    ]
    report("accountant", findings, {"trainings": rows, "seconds": measured}, threads=1)


def _rounds(noise: float) -> list[Entry]:
    return [Entry("run", number + 1, "", STEPS, RATE, noise) for number in range(ROUNDS)]


def _ours(entries: list[Entry]) -> None:
    accountant._epsilon.cache_clear()
    accountant.epsilon_of(entries, DELTA)


def _opacus(found: IAccountant, noise: float) -> None:
    found.history = [(noise, RATE, ROUNDS * STEPS)]
    found.get_epsilon(DELTA)


def _calibrate() -> None:
    accountant._epsilon.cache_clear()
    accountant.noise_multiplier.cache_clear()
    accountant.noise_multiplier(EPSILONS[1], DELTA, RATE, ROUNDS * STEPS)


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
