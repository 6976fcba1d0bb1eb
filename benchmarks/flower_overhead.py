"""What Flower adds to a round: seconds and CPU seconds of four sites' messages of 2 MB each way, TLS on.

    python benchmarks/flower_overhead.py --engine .flower-venv/bin

Everything is real but the work: SuperLink, nginx and four SuperNodes on loopback, node keys, audit logs, a ClientApp
process for every message; a site's worker gives back at once what it was sent, an update of random values. In process
the same exchange is a function call. CPU seconds are those of all processes of the federation, the coordinator's too.
The first round is not counted.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from measure import RESULTS, machine

from fedsca_pipeline.federation.messages import Manifest, encode
from fedsca_pipeline.files import write_json
from fedsca_pipeline.flower import frames
from fedsca_pipeline.flower.audit import AuditLog
from fedsca_pipeline.flower.config import FlowerConfig, read_site_config
from fedsca_pipeline.flower.demo import LocalFederation, free_port
from fedsca_pipeline.flower.engine import engine_folder
from fedsca_pipeline.flower.fleet import FlowerFleet
from fedsca_pipeline.flower.site import run_site
from fedsca_pipeline.flower.superlink import open_link

SITES = ("a", "b", "c", "d")


def main() -> None:
    """Measure, print and keep; with ``--site`` or ``--echo`` be one of the processes that this takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, help="bin folder of the environment that flwr is in")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=2.0)
    parser.add_argument("--site", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--echo", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.echo is not None:
        _echo(socket.socket(fileno=options.echo))
    elif options.site is not None:
        _be_site(options.site)
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


def _be_site(file: Path) -> None:
    run_site(read_site_config(file), [sys.executable, __file__, "--echo"], threading.Event())


def _measure(options: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    payloads = dict.fromkeys(SITES, _update(int(options.megabytes * 1e6)))
    with tempfile.TemporaryDirectory(prefix="fedsca-") as root:
        folder = Path(root)
        with LocalFederation(folder, engine_folder(options.engine), free_port(), free_port()) as federation:
            federation.found(SITES)
            federation.start_superlink()
            federation.start_nginx()
            federation.register(SITES)
            for site in SITES:
                file = federation.site_file(site, folder / "data")
                federation.start(site, [sys.executable, __file__, "--site", str(file)])
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
    found = {"seconds": [value for value, _ in rounds], "cpu_seconds": [value for _, value in rounds]}
    settings = {"sites": len(SITES), "megabytes": options.megabytes}
    write_json(RESULTS / "flower_overhead.json", {"machine": machine(), **settings, **found})


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
    """Of this process and all below it, those that have ended included."""
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
