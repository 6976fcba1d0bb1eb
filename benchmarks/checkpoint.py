"""Measure the time of checkpoints, fsync included, relative to a round on the nuclei sites.

    python benchmarks/checkpoint.py --data DIR --foundations DIR

The rounds are those of fedsca in process: five sites, 32 training images each, features cached. For each round, the
script takes the time of the server's checkpoint, and of that plus the states that the sites write to disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measure import Ratio, report
from site_data import nuclei_sites

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.federation.fleets.data import SiteData
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.steps import LocalSettings
from fedsca_pipeline.federation.site.store import SiteStore
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation

SITES = ("fluo_256", "fluo_360", "fluo_696", "tissue_violet_320", "tissue_white_320")
LIMIT = 0.05


def main() -> None:
    """Run what the command line asks for and write ``results/checkpoint.json``."""
    options = _options()
    threads = resolve_threads(options.threads)
    spent: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=options.scratch) as root, ExitStack() as stack:
        stack.enter_context(deterministic(RunConfig(device="cpu"), threads))
        server = _server(options, Path(root))
        server_side = stack.enter_context(_timed(CheckpointFolder, "save"))
        site_side = [stack.enter_context(_timed(SiteStore, name)) for name in ("save_state", "save_snapshot")]
        rounds = server.rounds()
        for _ in range(options.rounds):
            start, saved, kept = time.perf_counter(), sum(server_side), sum(map(sum, site_side))
            next(rounds)
            spent["round"].append(time.perf_counter() - start)
            spent["server"].append(sum(server_side) - saved)
            spent["sites"].append(sum(map(sum, site_side)) - kept)
    everything = [server + sites for server, sites in zip(spent["server"], spent["sites"], strict=True)]
    report(
        "checkpoint",
        [
            Ratio("checkpoint of the server", "the rest of the round", _shares(spent["server"], spent["round"]), LIMIT),
            Ratio(
                "checkpoint of the server and states of the sites",
                "the rest of the round",
                _shares(everything, spent["round"]),
                LIMIT,
            ),
        ],
        {"seconds": spent, "training_images_a_site": options.images},
        threads=threads,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the nuclei sites")
    parser.add_argument("--foundations", type=Path, default=Path("data/06_models/foundations"))
    parser.add_argument("--images", type=int, default=32, help="training images per site")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, help="number of torch threads (default: all cores)")
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    return parser.parse_args()


def _server(options: argparse.Namespace, root: Path) -> Server:
    found = nuclei_sites(options.data, SITES, root, images=options.images)
    model = load_foundation(FoundationConfig(), options.foundations, image_size=256, classes=1)
    attach_adapters(model, AdaptersConfig())
    layout, training = tensor_layout(model), TrainingConfig()
    strategy = build_strategy("fedsca", {}, layout)
    cache_bytes = int(training.feature_cache * 2**30 / len(found))
    worker = LocalWorker(
        model, strategy, LocalSettings("benchmark", 0, 1, "fp16", 8, 0.5, training, cache_bytes=cache_bytes)
    )
    fleet = InProcessFleet(worker, SiteData(found), root / "sites")
    folder = CheckpointFolder(root / "server", "benchmark", root / "sites")
    config = FederationConfig(rounds=options.rounds)
    return Server(fleet, strategy, worker.initial, config, run="benchmark", seed=0, folder=folder)


@contextmanager
def _timed(owner: type, name: str) -> Iterator[list[float]]:
    """Record the seconds of every call of a method."""
    seconds: list[float] = []
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    with patch.object(owner, name, timed):
        yield seconds


def _shares(parts: list[float], rounds: list[float]) -> list[float]:
    return [part / (whole - part) for part, whole in zip(parts, rounds, strict=True)]


if __name__ == "__main__":
    main()
