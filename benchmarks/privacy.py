"""Measure what differential privacy inside the sites costs on the nuclei sites: test Dice at three epsilons, and time.

    python benchmarks/privacy.py --data DIR               # seeds one after the other, until --minutes are over

FedSCA with the preset ``nuclei`` and the real mobile_sam, without differential privacy and with epsilon 2, 8 and 32 (at
delta 1e-5, for a whole run). The training settings for differential privacy are chosen once among ``CANDIDATES``, at
epsilon 8 on the first seed, by the validation images; test scores play no part. No image's patient is known, so the
guarantee is image-level. Results are stored after every training; the same command resumes.

Dividing the noise estimates the effect of more images: a site with k times the images, drawn at the same rate, has the
same noise in a sum of k times as many gradients. Only the noise is that of a larger site; the images are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import yaml
from nuclei import PROJECT, TRAINING_SITES, _kedro_run
from rich.console import Console
from rich.table import Table

from fedsca_pipeline.comparison.cell import CellInputs, run_cell
from fedsca_pipeline.comparison.plan import Setting, cells, resolve_methods
from fedsca_pipeline.comparison.results import validation_dice
from fedsca_pipeline.config import GROUPS, ComparisonConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.federation.run import code_version
from fedsca_pipeline.federation.site.privacy.optimizer import NoisyOptimizer

EPSILONS, CHOSEN_AT, DELTA = (2.0, 8.0, 32.0), 8.0, 1e-5
# Expected are 32 images per round and site, as without privacy. A frozen decoder (decoder_factor 0) leaves a fifteenth
# of the values to add noise to; at the start the decoder's gradients have some 50 times the norm of the adapters'.
_STILL: Mapping[str, Any] = {"training.decoder_factor": 0.0, "training.privacy.clip": 0.5}
CANDIDATES: Mapping[str, Mapping[str, Any]] = {
    "decoder still, width 4, 8 images a step, rate 0.01": {
        **_STILL, "adapters.width": 4, "training.batch_size": 8, "training.learning_rate": 0.01,
    },
    "all trained, 8 images a step, rate 0.001": {"training.batch_size": 8},
}  # fmt: skip
LARGER = (10, 100)
NO_PRIVACY, SAME_WAY = "no privacy", "no privacy, trained the same way"


def main() -> None:
    """Run the trainings that have no stored result, and print the table."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    trial = _Trial(options)
    results = json.loads(options.output.read_text()) if options.output.is_file() else {"cells": {}}
    results["machine"] = {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    results["settings"] = {"rounds": options.rounds, "delta": DELTA, "clip": 1.0, "threads": 1}
    trial.run(results, NO_PRIVACY, 0, {}, until)
    for name, changes in CANDIDATES.items():
        trial.run(results, f"choice: {name}", 0, _private(CHOSEN_AT, changes), until)
    results["chosen"] = _best(results["cells"])
    chosen = CANDIDATES[results["chosen"]]
    found = results["cells"][f"choice: {results['chosen']}, seed 0"]
    results["cells"].setdefault(f"epsilon {CHOSEN_AT:g}, seed 0", found)
    wanted = {
        **{f"epsilon {epsilon:g}": _private(epsilon, chosen) for epsilon in sorted(EPSILONS, reverse=True)},
        NO_PRIVACY: {},
        SAME_WAY: {key: value for key, value in chosen.items() if "privacy" not in key},
    }
    for seed in range(options.seeds):
        for name, changes in wanted.items():
            trial.run(results, name, seed, changes, until)
        for times in LARGER if seed == 0 else ():
            with _as_if_larger(times):
                name = f"epsilon {CHOSEN_AT:g}, noise of {times} times the images"
                trial.run(results, name, seed, wanted[f"epsilon {CHOSEN_AT:g}"], until)
    _show(results, Console())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the nuclei sites, one folder each")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no training after this many minutes")
    parser.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "privacy.json")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fedsca_privacy", help="data root")
    options = parser.parse_args()
    if missing := [site for site in TRAINING_SITES if not (options.data / site).is_dir()]:
        parser.error(f"--data {options.data}: no folder {', '.join(missing)}; docs/nuclei.md says where to get them")
    options.work, options.data = options.work.absolute(), options.data.absolute()
    return options


def _private(epsilon: float, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {"training.privacy.epsilon": epsilon, "training.privacy.delta": DELTA, **changes}


@contextmanager
def _as_if_larger(times: int) -> Iterator[None]:
    """Divide the noise of every step; the accountant still counts the full noise."""
    real = NoisyOptimizer.__init__

    def quieter(self: NoisyOptimizer, *arguments: Any, noise_multiplier: float, **options: Any) -> None:
        real(self, *arguments, noise_multiplier=noise_multiplier / times, **options)

    with mock.patch.object(NoisyOptimizer, "__init__", quieter):
        yield


def _best(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the candidate with the highest validation Dice."""
    tried = {key.removeprefix("choice: ").removesuffix(", seed 0"): cell for key, cell in found.items()}
    return max((name for name in CANDIDATES if name in tried), key=lambda name: tried[name]["validation"])


class _Trial:
    """Prepared sites, and the training runs on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        root = options.work / "prepared"
        for pipeline in ("preprocessing", "foundation"):
            if not (root / "02_intermediate" / "foundation.json").is_file():
                _kedro_run(options, "prepared", pipeline, "run.seed=0")
        self._root = root
        reports = {
            site: json.loads((root / "02_intermediate" / site / "report.json").read_text()) for site in TRAINING_SITES
        }
        self._data = {
            site: f"{report['fingerprint']}-{report['split']['fingerprint']}" for site, report in reports.items()
        }

    def run(self, results: dict[str, Any], name: str, seed: int, changes: Mapping[str, Any], until: float) -> None:
        """Train and test once and store the result, unless it is stored already or the time is over."""
        key = f"{name}, seed {seed}"
        if key in results["cells"] or time.monotonic() > until:
            return
        stamps = [time.process_time()]
        found = run_cell(self._cell(seed, changes), self._inputs(), lambda *_: stamps.append(time.process_time()))
        # The first interval includes loading, the last is only validation.
        seconds = [after - before for before, after in pairwise(stamps[1:-1])]
        dice = {site: statistics.mean(scores["dice"]) for site, scores in found["sites"].items()}
        results["cells"][key] = {
            "changes": dict(changes),
            "validation": validation_dice(found),
            "dice": dice,
            "mean": statistics.mean(dice.values()),
            "best_round": {site: scores["round"] for site, scores in found["sites"].items()},
            "cpu_seconds_a_round": seconds,
        }
        self._options.output.parent.mkdir(parents=True, exist_ok=True)
        self._options.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{key}: validation Dice {results['cells'][key]['validation']:.4f}, {sum(seconds):.0f} CPU s", flush=True)

    def _cell(self, seed: int, changes: Mapping[str, Any]) -> Any:
        groups = yaml.safe_load((PROJECT / "conf" / "nuclei" / "parameters.yml").read_text()) | {
            "federation": {"rounds": self._options.rounds},
            "evaluation": {"every": 2, "after_training": False},
        }
        base = {
            name: model.model_validate(groups.get(name, {})).model_dump(mode="json") for name, model in GROUPS.items()
        }
        config = ComparisonConfig.model_validate({"methods": {"fedsca": {"set": dict(changes)}}, "seeds": [seed]})
        setting = Setting(base, {}, self._data, "mobile_sam", config)
        methods = resolve_methods(setting)
        (cell,) = cells(methods, setting, {"fedsca": methods["fedsca"].rates[0]})
        return cell

    def _inputs(self) -> CellInputs:
        arrays = {
            site: SiteArrays(
                self._root / "05_model_input" / f"{site}.safetensors",
                pd.read_csv(self._root / "03_primary" / site / "manifest.csv", dtype=dict(MANIFEST_DTYPES)),
            )
            for site in TRAINING_SITES
        }
        return CellInputs(arrays, self._options.work / "foundations", self._options.work / "cells", code_version())


def _seconds(cell: Mapping[str, Any]) -> float:
    """Return the mean CPU seconds of a round, or NaN if an older version of this benchmark did not record them."""
    found = cell.get("cpu_seconds_a_round")
    return statistics.mean(found) if found else math.nan


def _show(results: Mapping[str, Any], console: Console) -> None:
    found = {key: cell for key, cell in results["cells"].items() if not key.startswith("choice")}
    table = Table(title=f"nuclei, test Dice of the chosen models; trained with {results['chosen']}")
    for column in ("", "mean over sites", "worst site", "CPU s a round", "times no privacy"):
        table.add_column(column, justify="right" if column else "left")
    for key, cell in found.items():
        plain = found.get(f"{NO_PRIVACY}, {key.rpartition(', ')[2]}")
        seconds = _seconds(cell)
        ratio = seconds / _seconds(plain) if plain else math.nan
        worst = min(cell["dice"], key=cell["dice"].__getitem__)
        table.add_row(
            key, f"{cell['mean']:.4f}", f"{cell['dice'][worst]:.4f} {worst}", f"{seconds:.1f}", f"{ratio:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
