"""Measure what the audit log adds to a message at either end: its line, on disk before the message is sent or used.

    python benchmarks/audit.py [--megabytes 2] [--scratch DIR]

One repetition is a round's message to a site and its answer; each is inspected, hashed and logged as a hospital's
command does it. The baseline for wall time is the least that any log on disk costs: hash the same messages and append
two lines of the same length, each with fsync. The baseline for CPU seconds is the work that the messages cost anyway:
encode and decode each of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from statistics import median

import torch
from measure import Ratio, in_turn, ratios, report, seconds

from fedsca_pipeline.federation.messages.codec import decode, encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.flower.audit.log import AuditLog
from fedsca_pipeline.flower.messages.contents import answer_content, check_tensors, request_content

TENSORS = 50
MOST = 2**28
DISK_LIMIT = 1.5
CPU_LIMIT = 1.0


def main() -> None:
    """Measure, print, and write ``results/audit.json``."""
    options = _options()
    torch.set_num_threads(1)
    aggregate, update = (_message(kind, int(options.megabytes * 1e6)) for kind in ("aggregate", "update"))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, AuditLog(Path(folder) / "audit.jsonl") as log:
        rounds = count(1)

        def audited() -> None:
            _audited(log, next(rounds), aggregate, update)

        audited()
        line = (Path(folder) / "audit.jsonl").read_bytes().splitlines(keepends=True)[-1]
        with (Path(folder) / "bare").open("ab", buffering=0) as file:
            candidates = {
                "audited": lambda: seconds(audited),
                "bare": lambda: seconds(lambda: _bare(file.fileno(), line, aggregate, update)),
                "audited, processor": lambda: _cpu_seconds(audited),
                "messages, processor": lambda: _cpu_seconds(lambda: _made_and_read(aggregate, update)),
            }
            found = in_turn(candidates, options.repetitions)
    report(
        "audit",
        [
            Ratio(
                "a message and its answer in the log",
                "hash and fsync alone",
                ratios(found["audited"], found["bare"]),
                DISK_LIMIT,
            ),
            Ratio(
                "the same, CPU seconds",
                "making and reading both messages",
                ratios(found["audited, processor"], found["messages, processor"]),
                CPU_LIMIT,
            ),
        ],
        {
            "megabytes": options.megabytes,
            "median_milliseconds": {name: round(1e3 * median(values), 2) for name, values in found.items()},
            "seconds": found,
        },
        threads=1,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2.0, help="size of a message (default 2)")
    parser.add_argument("--repetitions", type=int, default=201)
    parser.add_argument("--scratch", type=Path, help="folder on the disk to measure")
    return parser.parse_args()


def _message(kind: str, size: int) -> bytes:
    tensors = {f"block_{index}.weight": 1e-3 * torch.randn(size // 2 // TENSORS) for index in range(TENSORS)}
    return encode(_manifest(kind), tensors)


def _manifest(kind: str) -> Manifest:
    metrics = {"loss": 0.5, "steps": 16, "seconds": 12.5} if kind == "update" else {}
    return Manifest(kind, "0" * 16, 1, "hospital_a", "0" * 16, 32, "fp16", relative=False, metrics=metrics)


def _audited(log: AuditLog, round_: int, aggregate: bytes, update: bytes) -> None:
    """Log a message and its answer as the hospital does; the coordinator does the same without the check of tensors."""
    whose = {"site": "hospital_a", "kind": "round", "round_": round_}
    question = request_content("round", aggregate, MOST)
    asked = log.add("in", sent=aggregate, content=question, **whose)
    answer = answer_content("round", update, MOST)
    check_tensors(answer, question)
    log.add("out", sent=update, content=answer, answer_to=asked, **whose)


def _bare(file: int, line: bytes, *messages: bytes) -> None:
    for message in messages:
        sha256(message).digest()
        os.write(file, line)
        os.fsync(file)


def _made_and_read(*messages: bytes) -> None:
    for message in messages:
        read = decode(message, max_bytes=MOST)
        encode(read.manifest, read.tensors)


def _cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
