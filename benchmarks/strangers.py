"""Measure the memory that callers without a private key take at the coordinator of a deployed federation.

    python benchmarks/strangers.py --engine .flower-venv/bin

SuperLink and nginx are real, on loopback, anew for each value. A stranger sends 32 bodies of the largest size that
nginx allows, through nginx and, as the baseline, to the SuperLink's own port: the growth of its peak resident memory
counts. Then callers who know the public keys of eight hospitals send four such bodies each, all at once: the peak of
SuperLink and nginx together counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from measure import Ratio, in_turn, ratios, report

from fedsca_pipeline.flower.processes.engine import engine_folder

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("deploy", "tests/support")]

import stranger

from demo import LocalFederation, free_port

HOSPITALS = [f"hospital_{index}" for index in range(8)]
BODIES = 32
GROWTH_LIMIT, COORDINATOR_GIB = 0.05, 1.0


def main() -> None:
    """Measure, print and write ``results/strangers.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="bin folder of Flower's environment")
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    engine = engine_folder(given.engine)
    found = in_turn(
        {
            "through nginx": lambda: growth(engine, filtered=True),
            "to the SuperLink": lambda: growth(engine, filtered=False),
            "known keys": lambda: with_known_keys(engine),
        },
        given.repetitions,
    )
    findings = [
        Ratio(
            f"growth of the SuperLink from {BODIES} bodies of a stranger, through nginx",
            "the same bodies, sent to the SuperLink",
            ratios(found["through nginx"], found["to the SuperLink"]),
            GROWTH_LIMIT,
        ),
        Ratio(
            f"SuperLink and nginx with {BODIES} of the largest bodies under the keys of {len(HOSPITALS)} hospitals",
            "GiB",
            found["known keys"],
            COORDINATOR_GIB,
        ),
    ]
    report("strangers", findings, {"mebibytes": LocalFederation.max_message, "growth_and_peak_gib": found})


@contextmanager
def coordinator(engine: Path, sites: Sequence[str]) -> Iterator[LocalFederation]:
    """Start SuperLink and nginx, with the keys of ``sites`` registered."""
    # The paths of other folders can be too long for unix sockets.
    with (
        tempfile.TemporaryDirectory(prefix="fedsca-") as folder,
        LocalFederation(Path(folder), engine, free_port(), free_port()) as federation,
    ):
        federation.make_certificates(sites)
        federation.start_superlink()
        federation.register(sites)
        federation.start_nginx()
        yield federation


def growth(engine: Path, *, filtered: bool) -> float:
    """Return by how many GiB the SuperLink grows from the bodies of a stranger, through nginx or without it."""
    with coordinator(engine, HOSPITALS[:1]) as federation:
        before = stranger.peak_memory(federation, "superlink")
        entered = federation if filtered else replace(federation, public_port=federation.superlink_port)
        send(entered, [""] * BODIES)
        return (stranger.peak_memory(federation, "superlink") - before) / 2**30


def with_known_keys(engine: Path) -> float:
    """Return the peak of SuperLink and nginx in GiB, with bodies under the public keys of all hospitals."""
    with coordinator(engine, HOSPITALS) as federation:
        keys = [stranger.public_key(federation, site) for site in HOSPITALS]
        send(federation, [key for key in keys for _ in range(BODIES // len(keys))])
        return sum(stranger.peak_memory(federation, part) for part in ("superlink", "nginx")) / 2**30


def send(federation: LocalFederation, keys: Sequence[str]) -> None:
    """Send one body of the largest size under each key, all at the same time."""
    size = LocalFederation.max_message * 2**20
    with stranger.held([stranger.push(federation, key, size) for key in keys]) as bodies:
        stranger.answers(bodies)


if __name__ == "__main__":
    main()
