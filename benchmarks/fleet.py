"""Time one round over several sites: one worker process per site, against one site after the other.

    python benchmarks/fleet.py --data DIR --foundations DIR

The sites are real nuclei sites (docs/nuclei.md), the foundation is mobile_sam. A round is one ``fleet.exchange``:
messages, two validations and local training at every site, with features cached as in a run; the first round, which
fills the cache, is not timed. The candidates take turns, each in its own processes, because the threads of one would
slow down the next. The time to start the processes is reported separately.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from measure import Ratio, in_turn, ratios, report, seconds
from site_data import nuclei_sites

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.federation.fleets.data import SiteData
from fedsca_pipeline.federation.fleets.fleet import Failure, Fleet
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet, LocalSites
from fedsca_pipeline.federation.fleets.registry import available_cores, open_fleet
from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.federation.site.steps import LocalSettings, ignore_step
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation
from fedsca_pipeline.model.layout import hash_tensors

SITES = ("fluo_256", "fluo_360", "fluo_696", "tissue_violet_320")
# A round in which every site fails at once; its time is the time to start the workers.
STARTING = 99


@dataclass(frozen=True)
class Way:
    """One candidate: threads per site, and number of sites that train at once."""

    threads: int
    workers: int


def main() -> None:
    """Time rounds of the three candidates in turn and write ``results/fleet.json``."""
    options = _options()
    cores = available_cores()
    at_once = min(cores, len(options.sites))
    ways = {"one thread": Way(1, 1), "all threads": Way(cores, 1), "sites at once": Way(cores // at_once, at_once)}
    with tempfile.TemporaryDirectory() as root, ExitStack() as opened:
        data = SiteData(nuclei_sites(options.data, options.sites, Path(root), images=options.images))
        make = {name: partial(_sites, options, data, Path(root) / name, way.threads) for name, way in ways.items()}
        payloads = _payloads(make["one thread"]())
        fleets: dict[str, InProcessApart | Fleet] = {}
        started = {
            name: seconds(lambda name=name: fleets.update({name: _started(opened, make[name], ways[name])}))
            for name in ways
        }
        replies = {name: exchange(fleet, payloads) for name, fleet in fleets.items()}
        identical = ways["sites at once"].threads == 1 and _same(replies["one thread"], replies["sites at once"])
        found = in_turn(
            {name: lambda fleet=fleet: seconds(lambda: exchange(fleet, payloads)) for name, fleet in fleets.items()},
            options.repetitions,
        )
    quick = found["sites at once"]
    report(
        "fleet",
        [
            Ratio("a round, sites at once", "one thread", ratios(found["one thread"], quick), 1.8, at_least=True),
            Ratio("a round, sites at once", "all threads", ratios(found["all threads"], quick), 1.2, at_least=True),
        ],
        {
            "sites": list(options.sites),
            "training_images_a_site": options.images,
            "ways": {name: asdict(way) for name, way in ways.items()},
            "seconds": found,
            "seconds_to_start": started,
            "bit_identical_to_one_thread": identical,
        },
        threads=cores,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the nuclei sites")
    parser.add_argument("--foundations", type=Path, required=True, help="a foundation_root that holds mobile_sam")
    parser.add_argument("--sites", nargs="+", default=SITES)
    parser.add_argument("--images", type=int, default=32, help="training images per site")
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def _sites(options: argparse.Namespace, data: SiteData, folder: Path, threads: int) -> LocalSites:
    model = load_foundation(FoundationConfig(), options.foundations, image_size=256, classes=1)
    attach_adapters(model, AdaptersConfig())
    training = TrainingConfig()
    cache_bytes = int(training.feature_cache * 2**30 / len(data))
    settings = LocalSettings("benchmark", 0, 1, "fp16", 8, 0.5, training, cache_bytes=cache_bytes)
    layout = tensor_layout(model)
    strategy = build_strategy("fedsca", {}, layout)
    return LocalSites(model, strategy, settings, data, folder, torch.device("cpu"), threads)


def _payloads(here: LocalSites) -> dict[str, bytes]:
    """Return the messages of the first round, which hold the start values."""
    named = dict(here.model.named_parameters())
    shared = {name: named[name].detach().half().float() for name in here.strategy.shared()}
    manifest = {"kind": "aggregate", "run": "benchmark", "round": 1, "base_hash": hash_tensors(shared), "samples": 0}
    return {
        site: encode(Manifest(**manifest, site=site, dtype="fp16", relative=False, metrics={}), shared)
        for site in here.data
    }


class InProcessApart:
    """The in-process fleet in a fresh process, as in ``kedro run``."""

    def __init__(self, make: Callable[[], LocalSites]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> InProcessApart:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **_: Any) -> Mapping[str, bytes | Failure]:
        """Run a round in that process."""
        self._pipe.send((round_, payloads))
        return self._pipe.recv()


def _serve(make: Callable[[], LocalSites], pipe: Connection) -> None:
    here = make()
    with deterministic(RunConfig(device="cpu"), here.threads):
        fleet = InProcessFleet(here.worker(here.device), here.data, here.folder)
        while True:
            round_, payloads = pipe.recv()
            pipe.send(fleet.exchange(round_, payloads, deadline=None, quorum=1, grace=0.0))


def _started(opened: ExitStack, make: Callable[[], LocalSites], way: Way) -> InProcessApart | Fleet:
    """Return a fleet whose processes have started."""
    if way.workers == 1:
        fleet = opened.enter_context(InProcessApart(make))
        exchange(fleet, {}, STARTING)
        return fleet
    here = make()
    config = FederationConfig(
        fleet="processes", workers=way.workers, inject_failures={site: [STARTING] for site in here.data}
    )
    fleet = opened.enter_context(open_fleet(config, here, ignore_step))
    exchange(fleet, dict.fromkeys(here.data, b""), STARTING)
    return fleet


def exchange(
    fleet: InProcessApart | Fleet, payloads: Mapping[str, bytes], round_: int = 1
) -> Mapping[str, bytes | Failure]:
    """Run a round; the same round run twice gives the same answers."""
    return fleet.exchange(round_, payloads, deadline=None, quorum=1, grace=0.0)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the updates of two rounds are equal, bit for bit."""
    pairs = [(decode(one[site]).tensors, decode(other[site]).tensors) for site in one]
    return all(torch.equal(mine[name], theirs[name]) for mine, theirs in pairs for name in mine)


if __name__ == "__main__":
    main()
