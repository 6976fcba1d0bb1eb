"""Measure what Flower adds to a round, and the memory of a whole deployed run.

    python benchmarks/flower_overhead.py --engine .flower-venv/bin --foundations DIR [--only messages | run]

Messages: seconds and CPU seconds of four sites' messages of 2 MB each way, with TLS. Everything is real except the
training: SuperLink, nginx and four SuperNodes on loopback, node keys, audit logs, one ClientApp process per message. A
site's worker returns at once what it received, an update of random values. In process the same exchange is a function
call. CPU seconds are those of all processes of the federation, including the coordinator. The first round is not
counted.

Run: ``kedro run --env=flower`` with three hospitals, the real mobile_sam and a few phantoms each. The resident memory
of the coordinator's process tree and of the SuperLink is sampled from outside; the peak counts. A site's worker records
each load of the foundation.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from measure import RESULTS, Ratio, report

from fedsca_pipeline.config import DemoSitesConfig
from fedsca_pipeline.data.demo.sites import write_demo_sites
from fedsca_pipeline.federation.messages.codec import encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.files import read_json
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.config import FlowerConfig, read_site_config
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
from fedsca_pipeline.flower.coordinator.superlink import open_link
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import engine_folder
from fedsca_pipeline.flower.site.command import run_site

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "deploy"))

from demo import LocalFederation, free_port

NAME = "flower_overhead"
SITES = ("a", "b", "c", "d")
HOSPITALS = ("hospital_a", "hospital_b", "hospital_c")
COORDINATOR_GIB, ROUND_SECONDS = 1.0, 12.0
SAMPLE_SECONDS = 0.1


def main() -> None:
    """Measure, print and store; with ``--site``, ``--echo`` or ``--worker`` run one process of the federation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="bin folder of Flower's environment")
    parser.add_argument("--foundations", type=Path, help="a foundation_root that holds mobile_sam (default: fetch it)")
    parser.add_argument(
        "--only", choices=["messages", "run"], help="measure this, and keep the stored results of the other"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--site", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--real", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--line", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo is not None:
        _echo(socket.socket(fileno=options.echo))
    elif options.worker is not None:
        _be_worker(options.worker, options.line)
    elif options.site is not None:
        _be_site(options.site, options.real)
    else:
        _measure(options)


def _echo(line: socket.socket) -> None:
    frames.send(line, {"ready": True})
    while True:
        try:
            _, payload = frames.receive(line, 2**30)
        except EOFError:
            return
        frames.send(line, {}, payload)


def _be_worker(file: Path, line: str) -> None:
    """Run a site's worker, and record each load of the foundation in a file beside the site's YAML file."""
    from fedsca_pipeline.flower.site import worker
    from fedsca_pipeline.model.foundation.model import SegmentationModel

    build = SegmentationModel.__init__

    def noted(*args: Any, **options: Any) -> None:
        with file.with_suffix(".loads").open("a") as notes:
            notes.write("one\n")
        build(*args, **options)

    SegmentationModel.__init__ = noted

    sys.argv[1:] = [str(file), line]
    worker.main()


def _be_site(file: Path, real: bool) -> None:
    worker = ["--worker", str(file), "--line"] if real else ["--echo"]
    run_site(read_site_config(file), [sys.executable, __file__, *worker], threading.Event())


def _measure(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    kept = RESULTS / f"{NAME}.json"
    details = read_json(kept) if kept.is_file() else {}
    if options.only != "run":
        details |= {"sites": len(SITES), "megabytes": options.megabytes, **_messages(options)}
    if options.only != "messages":
        details["run"] = _run(options)
    found = details.get("run")
    findings = []
    if seconds := details.get("seconds"):
        findings.append(Ratio("a round of four sites' messages, beyond in process", "1 s", seconds, ROUND_SECONDS))
    if found:
        findings += [
            Ratio("coordinator, peak resident", "1 GiB", [found["peak_gib"]["kedro"]], COORDINATOR_GIB),
            Ratio("loads of the foundation in the whole run, by site", "one", found["loads"], 1.0),
        ]
    for key in ("machine", "ratios"):
        details.pop(key, None)
    report(NAME, findings, details)


@contextmanager
def _federation(
    options: argparse.Namespace, sites: Sequence[str], data: Path | None = None
) -> Iterator[LocalFederation]:
    """Start a federation: of real sites if ``data`` is given, else of sites that return each message unchanged."""
    with tempfile.TemporaryDirectory(prefix="fedsca-") as root:
        folder = Path(root)
        if options.foundations is not None:
            (folder / "foundations").symlink_to(options.foundations.resolve())
        with LocalFederation(folder, engine_folder(options.engine), free_port(), free_port()) as federation:
            federation.make_certificates(sites)
            federation.start_superlink()
            federation.register(sites)
            federation.start_nginx()
            for site, own in zip(
                sites, sorted(data.iterdir()) if data else [folder / "data"] * len(sites), strict=False
            ):
                file = federation.site_file(site, own)
                real = ["--real"] if data else []
                federation.start(site, [sys.executable, __file__, "--site", str(file), *real])
            yield federation


def _run(options: argparse.Namespace) -> dict[str, Any]:
    """Run a deployed federation; return each part's peak memory in GiB, and each site's number of foundation loads."""
    with tempfile.TemporaryDirectory() as data:
        write_demo_sites(Path(data), DemoSitesConfig(images_per_site=10))
        with _federation(options, HOSPITALS, Path(data)) as federation:
            tracking = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{federation.folder / 'mlflow.db'}"}
            command = federation.coordinate({"run.threads": 1, "federation.rounds": 3})
            federation.start("kedro", command, tracking)
            peaks: Counter[str] = Counter()
            while (status := federation.processes["kedro"].poll()) is None:
                federation.check_parts()
                for name, process in federation.processes.items():
                    peaks[name] = max(peaks[name], _resident(process.pid))
                time.sleep(SAMPLE_SECONDS)
            if status:
                raise RuntimeError(federation.log("kedro"))
            loads = [len((federation.folder / f"{site}.loads").read_text().split()) for site in HOSPITALS]
    return {
        "peak_gib": {name: round(peak / 2**30, 3) for name, peak in peaks.items()},
        "loads": loads,
    }


def _resident(leash: int) -> int:
    """Return the resident bytes of all processes below ``leash``; a page they share counts once per process."""
    total = 0
    for process in psutil.Process(leash).children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _messages(options: argparse.Namespace) -> dict[str, list[float]]:
    payloads = dict.fromkeys(SITES, _update(int(options.megabytes * 1e6)))
    with _federation(options, SITES) as federation:
        config = FlowerConfig(
            sites=list(SITES),
            superlink=f"127.0.0.1:{federation.superlink_port}",
            authority=federation.certificates / "ca.crt",
            engine=federation.engine,
            home=federation.home,
        )
        with open_link(config) as link, AuditLog(config.audit) as log:
            fleet = FlowerFleet(link, config, log=log)
            rounds = [_round(fleet, number, payloads) for number in range(options.rounds + 1)][1:]
    wall, cpu = (median(values) for values in zip(*rounds, strict=True))
    print(f"a round of {len(SITES)} sites x {options.megabytes:g} MB each way over Flower, beyond in process:")
    print(f"  {wall:.2f} s (of {[f'{value:.2f}' for value, _ in rounds]})")
    print(f"  {cpu:.2f} CPU s (of {[f'{value:.2f}' for _, value in rounds]})")
    return {"seconds": [value for value, _ in rounds], "cpu_seconds": [value for _, value in rounds]}


def _update(size: int) -> bytes:
    manifest = Manifest(
        kind="update", run="0" * 16, round=1, site="a", base_hash="0" * 16, samples=1, dtype="fp16", relative=True
    )
    return encode(manifest, {"values": torch.randn(size // 2)})


def _round(fleet: FlowerFleet, number: int, payloads: dict[str, bytes]) -> tuple[float, float]:
    started, before = time.perf_counter(), _cpu_seconds()
    answers = fleet.exchange(number, payloads, deadline=None, quorum=len(payloads), grace=0.0)
    taken = time.perf_counter() - started
    if answers != payloads:
        raise RuntimeError(f"round {number}: an answer is not what was sent")
    return taken, _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and all below it, including those that have ended."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


if __name__ == "__main__":
    main()
