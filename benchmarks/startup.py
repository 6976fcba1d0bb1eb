"""Measure commands that have nothing to do, and a small training, in CPU seconds of ``import torch, peft``.

    python benchmarks/startup.py              # about five minutes
    python benchmarks/startup.py --train      # also the wall time of `make train` in a bare clone, on two cores

All commands run in fresh clones of the committed project, with the Python that runs this script. CPU seconds are user
and system time of the command and its children.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from measure import Ratio, in_turn, ratios, report, seconds

PROJECT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

# Each command that has nothing to do, and its limit as a share of the imports.
LIMITS: Mapping[tuple[str, ...], float] = {
    ("kedro", "registry", "list"): 0.2,
    ("kedro", "run"): 0.35,
    ("kedro", "run", "--pipeline=federated_training"): 0.35,
    ("dvc", "repro"): 0.3,
}
TRAIN_LIMIT = 240.0
# Most of it is start-up.
_TRAINING, TRAINING_LIMIT = "a whole training of the smoke preset", 2.5
IMPORTS = (sys.executable, "-c", "import torch, peft")


def main() -> None:
    """Run what the command line asks for and write ``results/startup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7, help="repetitions of each command")
    parser.add_argument("--train", action="store_true", help="also time `make train`, which takes minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedsca_startup_") as folder:
        findings = _startup(_clone(Path(folder) / "built"), options.repetitions)
        if options.train:
            findings.append(_train(_clone(Path(folder) / "empty")))
    report("startup", findings, {"repetitions": options.repetitions, "preset": "smoke"})


def _clone(folder: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(folder)], check=True)
    return folder


def _startup(project: Path, repetitions: int) -> list[Ratio]:
    # DVC and Kedro share the files but have separate records of what is up to date; afterwards both are up to date.
    for command in (("dvc", "repro"), ("kedro", "run"), ("dvc", "repro")):
        _run(project, command, preset="smoke")
    runs = {" ".join(command): lambda command=command: _cpu_seconds(project, command) for command in LIMITS}
    runs[_TRAINING] = lambda: _small_training(project)
    runs["imports"] = lambda: _cpu_seconds(project, IMPORTS, idle=False)
    measured = in_turn(runs, repetitions)
    limits = {" ".join(command): limit for command, limit in LIMITS.items()} | {_TRAINING: TRAINING_LIMIT}
    return [
        Ratio(name, "import torch, peft", ratios(measured[name], measured["imports"]), limit)
        for name, limit in limits.items()
    ]


def _small_training(project: Path) -> float:
    """Return the CPU seconds of a whole training of the smoke preset; the foundation is there."""
    shutil.rmtree(project / "smoke_again", ignore_errors=True)
    command = ("kedro", "run", "--pipeline=federated_training", "--params=data_root=smoke_again")
    return _cpu_seconds(project, command, idle=False)


def _cpu_seconds(project: Path, command: Sequence[str], *, idle: bool = True) -> float:
    """``idle``: the command must have nothing to do."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = _run(project, command, preset="smoke")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # DVC always asks which parameters are in force, and has nothing to do if no stage after that runs.
    busy = output.count("Running stage") > 1 if "dvc" in command else "up to date" not in output
    if idle and "registry" not in command and busy:
        raise RuntimeError(f"{' '.join(command)} had something to do:\n{output}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _train(project: Path) -> Ratio:
    """Time `make train` on two cores, with the environment installed; the time includes fetching the foundation."""
    command = ("make", "train", "--old-file=install", f"BIN={BIN}")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:2])
    try:
        wall = seconds(lambda: _run(project, command))
    finally:
        os.sched_setaffinity(0, allowed)
    return Ratio("make train", "seconds", [wall], TRAIN_LIMIT)


def _run(project: Path, command: Sequence[str], preset: str = "local") -> str:
    """Run a command of this environment in ``project``, with a separate MLflow database; return its output."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "KEDRO_ENV": preset,
        "MLFLOW_TRACKING_URI": f"sqlite:///{project / 'mlflow.db'}",
    }
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
