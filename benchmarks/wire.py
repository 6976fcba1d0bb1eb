"""Measure the bytes of every message of real rounds, and the time to encode and decode one, against sending the model.

    python benchmarks/wire.py                 # the demonstration sites, mobile_sam, four rounds in each wire dtype
    python benchmarks/wire.py --data DIR      # the raw sites of DIR instead, one folder each

The real command prepares the sites. The rounds run in the project's own server, worker and fleet; the fleet also stores
each message. Each message is then encoded again with and without compression: the same tensors for all figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from measure import Ratio, in_turn, report, seconds
from rich.console import Console
from rich.table import Table

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import AdaptersConfig, FederationConfig, FoundationConfig, RunConfig, TrainingConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.fleets.in_process import InProcessFleet
from fedsca_pipeline.federation.messages.codec import Message, decode, encode
from fedsca_pipeline.federation.messages.manifest import Compression, WireDtype
from fedsca_pipeline.federation.run import resolve_threads
from fedsca_pipeline.federation.server.checkpoint import CheckpointFolder
from fedsca_pipeline.federation.server.rounds import Server
from fedsca_pipeline.federation.site.steps import LocalSettings
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.model.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.model.foundation import load_foundation

PROJECT = Path(__file__).resolve().parents[1]
IMAGE_SIZE, BYTES_FP32 = 256, 4
DTYPES, COMPRESSIONS, DIRECTIONS = get_args(WireDtype), get_args(Compression), ("down", "up")
LIMIT = 1 / 200


@dataclass
class RecordingFleet(InProcessFleet):
    """An in-process fleet that stores every message, decoded, with its direction and round."""

    carried: list[tuple[str, int, Message]] = field(default_factory=list)

    def exchange(self, round_: int, payloads: Mapping[str, bytes], **_: object) -> Mapping[str, bytes | Failure]:
        """Exchange as the project's own fleet does, and store the messages."""
        answers = super().exchange(round_, payloads)
        self.carried += [("down", round_, decode(payload)) for payload in payloads.values()]
        self.carried += [("up", round_, decode(answer)) for answer in answers.values() if isinstance(answer, bytes)]
        return answers


def main() -> None:
    """Run the rounds, print two tables, and write ``results/wire.json``."""
    options = _options()
    data = _prepare(options)
    threads = resolve_threads(None)
    with deterministic(RunConfig(device="cpu"), threads):
        carried = {dtype: _rounds(options, data, dtype) for dtype in DTYPES}
        milliseconds = _milliseconds(carried, options.repetitions)
    model = _model(options)
    layout = tensor_layout(model)
    whole = BYTES_FP32 * sum(p.numel() for p in model.parameters())
    trained = BYTES_FP32 * layout.size((*layout.adapters, *layout.decoder))
    sizes = _sizes(carried, options.rounds)
    headers = _headers(carried)
    _show(sizes, headers, milliseconds, whole, trained)
    findings = [
        Ratio(f"int8 + zstd, {direction}, {which}", "whole model, fp32", [size / whole for size in found], LIMIT)
        for (dtype, compression, direction, which), found in sizes.items()
        if (dtype, compression) == ("int8", "zstd")
    ]
    details = {
        "sites": sorted(data),
        "rounds": options.rounds,
        "whole_model_fp32": whole,
        "adapters_and_decoder_fp32": trained,
        "bytes": [dict(zip(_SIZE_KEYS, key, strict=True), sizes=found) for key, found in sizes.items()],
        "header_bytes": headers,
        "milliseconds": milliseconds,
    }
    report("wire", findings, details, threads=threads)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of raw sites (default: the demonstration sites)")
    parser.add_argument("--images", type=int, default=24, help="images of each demonstration site")
    parser.add_argument("--rounds", type=int, default=4, help="2 or more")
    parser.add_argument("--repetitions", type=int, default=31, help="repetitions of the timing")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fedsca_wire", help="data root")
    parser.add_argument("--foundations", type=Path, help="foundation root (default: in the data root)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: must be 2 or more, because the first round differs from later ones")
    options.work = options.work.absolute()
    options.foundations = (options.foundations or options.work / "foundations").absolute()
    return options


def _prepare(options: argparse.Namespace) -> dict[str, SiteArrays]:
    """Fetch the foundation and prepare the sites, unless done already; return the sites' arrays."""
    for folder in sorted(options.data.iterdir()) if options.data else ():
        if folder.is_dir() and not (options.work / "01_raw" / folder.name).is_dir():
            shutil.copytree(folder, options.work / "01_raw" / folder.name)
    given = (
        f"data_root={options.work},foundation_root={options.foundations},demo_sites.images_per_site={options.images}"
    )
    for pipeline in ("foundation", "preprocessing"):
        command = [sys.executable, "-m", "kedro", "run", f"--pipeline={pipeline}", "--params", given]
        environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{options.work / 'mlflow.db'}"}
        subprocess.run(command, cwd=PROJECT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {
        path.stem: SiteArrays(
            path, pd.read_csv(options.work / "03_primary" / path.stem / "manifest.csv", dtype=dict(MANIFEST_DTYPES))
        )
        for path in sorted((options.work / "05_model_input").glob("*.safetensors"))
    }


def _model(options: argparse.Namespace) -> Any:
    foundation = load_foundation(FoundationConfig(), options.foundations, image_size=IMAGE_SIZE, classes=1)
    return attach_adapters(foundation, AdaptersConfig())


def _rounds(
    options: argparse.Namespace, data: Mapping[str, SiteArrays], dtype: WireDtype
) -> list[tuple[str, int, Message]]:
    """Run a federation in one wire dtype; return all messages of its training rounds."""
    model = _model(options)
    layout = tensor_layout(model)
    strategy = build_strategy("fedsca", {}, layout)
    worker = LocalWorker(model, strategy, LocalSettings("benchmark", 0, 1, dtype, 8, 0.5, TrainingConfig()))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        fleet = RecordingFleet(worker, data, Path(folder) / "sites")
        server = Server(
            fleet,
            strategy,
            worker.initial,
            FederationConfig(rounds=options.rounds, wire_dtype=dtype),
            run="benchmark",
            seed=0,
            folder=CheckpointFolder(Path(folder) / "server", "benchmark"),
        )
        # Without the last validation, whose messages belong to no round.
        for _ in islice(server.rounds(), options.rounds):
            pass
    return fleet.carried


_SIZE_KEYS = ("dtype", "compression", "direction", "rounds")
Sizes = dict[tuple[str, str, str, str], list[int]]


def _sizes(carried: Mapping[str, Sequence[tuple[str, int, Message]]], rounds: int) -> Sizes:
    """Return the bytes of every message, by site and round."""
    later = f"rounds 2 to {rounds}"
    found: Sizes = {
        (dtype, compression, direction, which): []
        for dtype in DTYPES
        for compression in COMPRESSIONS
        for direction in DIRECTIONS
        for which in ("round 1", later)
    }
    for dtype, messages in carried.items():
        for direction, round_, message in messages:
            for compression in COMPRESSIONS:
                size = len(encode(message.manifest, message.tensors, compression))
                found[dtype, compression, direction, "round 1" if round_ == 1 else later].append(size)
    return found


def _milliseconds(
    carried: Mapping[str, Sequence[tuple[str, int, Message]]], repetitions: int
) -> dict[str, list[float]]:
    """Time encoding and decoding of the last update in each dtype, with and without zstd; in milliseconds."""
    candidates: dict[str, Callable[[], float]] = {}
    for dtype, messages in carried.items():
        _, _, message = messages[-1]
        for compression in COMPRESSIONS:
            data = encode(message.manifest, message.tensors, compression)
            encoding = partial(encode, message.manifest, message.tensors, compression)
            candidates[f"{dtype} {compression}, encode"] = partial(_timed, encoding)
            candidates[f"{dtype} {compression}, decode"] = partial(_timed, partial(decode, data))
    return in_turn(candidates, repetitions)


def _headers(carried: Mapping[str, Sequence[tuple[str, int, Message]]]) -> dict[str, int]:
    """Return the bytes of an update's safetensors header, by dtype, before compression."""
    last = {dtype: messages[-1][-1] for dtype, messages in carried.items()}
    plain = {dtype: encode(message.manifest, message.tensors, "none") for dtype, message in last.items()}
    return {dtype: 8 + int.from_bytes(data[:8], "little") for dtype, data in plain.items()}


def _timed(work: Callable[[], object]) -> float:
    return 1e3 * seconds(work)


def _show(sizes: Sizes, headers: Mapping[str, int], timed: Mapping[str, Sequence[float]], whole: int, of: int) -> None:
    table = Table(
        *(
            "wire dtype",
            "direction",
            "rounds",
            "plain",
            "header",
            "zstd",
            "share of the model",
            "share of adapters, decoder",
        ),
        title=f"bytes of a message, mean; the model in fp32: {whole:,}, adapters and decoder: {of:,}",
    )
    for (dtype, compression, direction, which), found in sizes.items():
        if compression == "zstd":
            plain, packed = statistics.mean(sizes[dtype, "none", direction, which]), statistics.mean(found)
            shares = f"{plain:,.0f}", f"{headers[dtype]:,}", f"{packed:,.0f}", f"1/{whole / packed:.0f}"
            table.add_row(dtype, direction, which, *shares, f"1/{of / packed:.0f}")
    times = Table("milliseconds of one update", "median", "lowest", "highest")
    for name, found in timed.items():
        times.add_row(name, *(f"{value:.2f}" for value in (statistics.median(found), min(found), max(found))))
    console = Console(width=120)
    console.print(table, times)


if __name__ == "__main__":
    main()
