"""Measure how a whole command grows with the sites and with the rounds.

    python benchmarks/growth.py                                     # 4, 16, 64 and 256 sites; 8 and 100 rounds
    python benchmarks/growth.py --sites 4 16 64 256 1000 --rounds 8 100 1000        # hours

Each point is ``kedro run --pipeline=federated_training --env=smoke`` (a tiny foundation, 10 images a site) in a data
root of its own: preparation, rounds, evaluation, figures and MLflow. CPU seconds are user and system time of the
command and its children; memory is the peak of the largest process. An exponent is the slope, in logarithms, of what a
command takes beyond the smallest one, over its sites or rounds beyond the smallest: 1 is a straight line.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from measure import Ratio, report

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.data.demo.sites import write_demo_sites

PROJECT = Path(__file__).resolve().parents[1]
LIMIT = 1.05
# Of the runs that differ in rounds.
FEW_SITES, FEW_ROUNDS = 4, 2


@dataclass(frozen=True)
class Point:
    """What one command took. ``start``: CPU seconds of a command over the same sites that has nothing to do."""

    sites: int
    rounds: int
    cpu_seconds: float
    start: float
    peak_mib: float
    disk_mib: float


def main() -> None:
    """Run what the command line asks for and write ``results/growth.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, nargs="+", default=[8, 100])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedsca_growth_") as folder:
        by_sites = [_point(Path(folder), sites, FEW_ROUNDS) for sites in sorted(options.sites)]
        by_rounds = [_point(Path(folder), FEW_SITES, rounds) for rounds in (FEW_ROUNDS, *sorted(options.rounds))]
    findings = [
        *_exponents(by_sites, "sites", lambda point: point.sites),
        *_exponents(by_rounds, "rounds", lambda point: point.rounds),
    ]
    points = {"sites": list(map(asdict, by_sites)), "rounds": list(map(asdict, by_rounds))}
    report("growth", findings, points, threads=1)


def _point(folder: Path, sites: int, rounds: int) -> Point:
    root = folder / f"{sites}_{rounds}"
    _write_sites(root / "01_raw", sites)
    given = f"data_root={root},foundation_root={folder / 'foundations'},federation.rounds={rounds}"
    command = ["kedro", "run", "--pipeline=federated_training", "--env=smoke", f"--params={given}"]
    cpu, peak = _measured(command, root)
    start, _ = _measured(command, root)
    disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and "01_raw" not in path.parts)
    shutil.rmtree(root)
    point = Point(sites, rounds, cpu, start, peak / 2**20, disk / 2**20)
    print(point, flush=True)
    return point


def _write_sites(raw: Path, count: int) -> None:
    """Write copies of the demonstration sites under other names, so that no command makes its own."""
    made = raw.with_name("made")
    write_demo_sites(made, DemoSitesConfig(images_per_site=10, image_size=64))
    for number, site in zip(range(count), itertools.cycle(sorted(made.iterdir())), strict=False):
        shutil.copytree(site, raw / f"site_{number:04d}")
    shutil.rmtree(made)


def _measured(command: Sequence[str], root: Path) -> tuple[float, int]:
    """Return the CPU seconds of a command and its children, and the bytes of its largest process."""
    # A process of its own, whose children are the command and no other.
    program = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print('MEASURED', used.ru_utime + used.ru_stime, used.ru_maxrss * 1024); sys.exit(code)"
    )
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    words = [sys.executable, "-c", program, sys.executable, "-m", *command]
    done = subprocess.run(words, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    seconds, peak = done.stdout.split("MEASURED")[-1].split()
    return float(seconds), int(peak)


def _exponents(points: Sequence[Point], what: str, size: Callable[[Point], int]) -> list[Ratio]:
    first, *others = points
    findings = []
    for name in ("cpu_seconds", "start", "disk_mib", "peak_mib"):
        beyond = [getattr(point, name) - getattr(first, name) for point in others]
        if len(others) < 2 or min(beyond) <= 0:
            continue
        sizes = [size(point) - size(first) for point in others]
        slope = float(np.polyfit(np.log(sizes), np.log(beyond), 1)[0])
        findings.append(Ratio(f"exponent of {name} over {what}, {sizes[0]} to {sizes[-1]} more", "1", [slope], LIMIT))
    return findings


if __name__ == "__main__":
    main()
