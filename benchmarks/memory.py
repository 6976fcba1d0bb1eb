"""Measure the memory of a run with many sites against a run with one.

    python benchmarks/memory.py --foundations DIR

Each run is the node ``train`` in its own process: the real mobile_sam, phantoms at 256 px, a few images per site, whole
rounds with messages, states and checkpoints. Its memory is summed over its processes and sampled from outside; the peak
counts. Resident pages (Rss) include those of mapped files, and count shared pages once per process. Proportional pages
(Pss) count shared pages once. Anonymous pages belong to no file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from measure import Ratio, in_turn, ratios, report

PAGES = ("Rss", "Pss", "Anonymous")
LIMIT = 1.25
SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Run:
    """One run to measure."""

    fleet: str
    workers: int
    sites: int


def main() -> None:
    """Measure each fleet with one site and with many, and with a second worker; write ``results/memory.json``."""
    options = _options()
    runs = {
        f"{fleet}, {sites} sites, {workers} at once": Run(fleet, workers, sites)
        for fleet, workers, sites in (
            ("in_process", 1, 1),
            ("in_process", 1, options.sites),
            ("processes", 1, 1),
            ("processes", 1, options.sites),
            ("processes", 2, options.sites),
        )
    }
    with tempfile.TemporaryDirectory() as root:
        data = _site_data(options, Path(root))
        peaks = in_turn(
            {name: lambda run=run: _peaks(options, run, data) for name, run in runs.items()}, options.repetitions
        )
    one, many = "{}, 1 sites, 1 at once", f"{{}}, {options.sites} sites, 1 at once"
    findings = [
        Ratio(
            f"{fleet}: {pages}, {options.sites} sites",
            "one site",
            ratios(*([peak[pages] for peak in peaks[name.format(fleet)]] for name in (many, one))),
            LIMIT,
        )
        for fleet in ("in_process", "processes")
        for pages in PAGES
    ]
    details = {key: getattr(options, key) for key in ("sites", "images", "rounds", "threads")}
    report("memory", findings, {**details, "peaks_mb": peaks}, threads=options.threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--foundations", type=Path, required=True, help="a foundation_root that holds mobile_sam")
    parser.add_argument("--sites", type=int, default=50)
    parser.add_argument("--images", type=int, default=2, help="training images per site")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch threads per site")
    parser.add_argument("--repetitions", type=int, default=1)
    return parser.parse_args()


def _site_data(options: argparse.Namespace, root: Path) -> list[tuple[Path, pd.DataFrame]]:
    """Prepare one phantom site; return arrays and manifest of ``options.sites`` copies, each with its own file."""
    from safetensors.numpy import save_file

    from fedsca_pipeline.config import DemoSitesConfig, PreprocessingConfig, SplitConfig
    from fedsca_pipeline.data.demo.sites import write_demo_sites
    from fedsca_pipeline.data.manifest import manifest_digest
    from fedsca_pipeline.data.preprocessing.prepare import prepare_site

    raw = root / "raw"
    write_demo_sites(raw, DemoSitesConfig(images_per_site=options.images + 2))
    config = PreprocessingConfig(split=SplitConfig(validation=1, test=1))
    prepared = prepare_site(raw, min(path.name for path in raw.iterdir()), config, seed=0)
    first = root / "site_000.safetensors"
    save_file({**prepared.arrays, "manifest": manifest_digest(prepared.manifest)}, first)
    found = [(first, prepared.manifest.assign(site=first.stem))]
    for number in range(1, options.sites):
        path = first.with_stem(f"site_{number:03d}")
        shutil.copy(first, path)
        found.append((path, prepared.manifest.assign(site=path.stem)))
    return found


def _peaks(options: argparse.Namespace, run: Run, data: list[tuple[Path, pd.DataFrame]]) -> dict[str, float]:
    """Run in a new process with its own process group; return its peaks in MB."""
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(options, run, data[: run.sites]))
    process.start()
    peaks: Counter[str] = Counter()
    while process.is_alive():
        peaks |= _held(process.pid)
        time.sleep(SAMPLE_SECONDS)
    if process.exitcode:
        raise SystemExit(f"{run} ended with exit code {process.exitcode}")
    return {pages: round(peaks[pages] / 1e3, 1) for pages in PAGES}


def _train(options: argparse.Namespace, run: Run, data: list[tuple[Path, pd.DataFrame]]) -> None:
    os.setpgid(0, 0)
    from fedsca_pipeline.config import FederationConfig, RunConfig, Settings
    from fedsca_pipeline.pipelines.federated_training.nodes import train

    with tempfile.TemporaryDirectory() as checkpoints:
        settings = Settings(
            run=RunConfig(device="cpu", threads=options.threads),
            federation=FederationConfig(rounds=options.rounds, fleet=run.fleet, workers=run.workers),
        )
        rounds = train(
            settings,
            {"fingerprint": "benchmark", "configuration": {}},
            True,
            options.foundations,
            Path(checkpoints),
            Path(checkpoints) / "private",
            *(part for path, manifest in data for part in (manifest, path)),
        )
        for _ in rounds:
            pass


def _held(group: int) -> Counter[str]:
    """Return the memory of a process group now, in kB by kind of page."""
    held: Counter[str] = Counter()
    for process in _members(group):
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        for name, value, *_ in map(str.split, lines[1:]):
            held[name.rstrip(":")] += int(value)
    return held


def _members(group: int) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                yield process
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
