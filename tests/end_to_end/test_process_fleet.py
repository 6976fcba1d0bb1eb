"""Sites trained at once, in processes of their own, by the real command."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PROCESSES = "federation.fleet=processes"


@pytest.fixture
def params(rounds: int) -> str:
    """Those of ``finished``; the fleet comes on top."""
    return f"federation.rounds={rounds}"


def checkpoint_written(place) -> Callable[[], bool]:
    return lambda: any(place.checkpoints.glob("*/server/round_*.safetensors"))


def models(place) -> dict[str, str]:
    """Return the hashes of all model files."""
    return {path: digest for path, digest in place.contents("06_models").items() if path.endswith(".safetensors")}


def alive(group: int) -> list[str]:
    """Return the processes of a group that have not ended, by their names."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        state, _parent, its_group = rest.split()[:3]
        if int(its_group) == group and state != "Z":
            found.append(name)
    return found


def test_both_fleets_end_in_the_same_models_and_scores(sites, finished, params) -> None:
    done = sites.run(params=f"{params},{PROCESSES}")

    assert done.code == 0, done.output
    assert "Traceback" not in done.output
    assert models(sites) == models(finished)
    assert models(sites)
    assert (sites.reporting / "image_scores.csv").read_bytes() == (finished.reporting / "image_scores.csv").read_bytes()
    assert sites.partial_files() == []


@pytest.mark.slow
def test_ctrl_c_ends_every_process_quietly_and_the_other_fleet_goes_on(sites, finished, params) -> None:
    process = sites.start(params=f"{params},{PROCESSES}")
    stopped = sites.signalled(process, checkpoint_written(sites), signal.SIGINT)

    assert stopped.code == 130
    assert "The same command (without force) resumes" in stopped.words
    assert "Traceback" not in stopped.output
    assert alive(process.pid) == []

    resumed = sites.run(params=params)

    assert resumed.code == 0, resumed.output
    assert models(sites) == models(finished)


@pytest.mark.slow
def test_workers_do_not_outlive_a_run_that_was_killed(sites, finished, params) -> None:
    if not Path("/proc/self/stat").is_file():
        pytest.skip("this system has no /proc to find processes in")
    process = sites.start(params=f"{params},{PROCESSES}")
    while not checkpoint_written(sites)() and process.poll() is None:
        time.sleep(0.01)
    workers = alive(process.pid)
    os.kill(process.pid, signal.SIGKILL)  # and nobody else
    process.wait()

    limit = time.monotonic() + 30
    while alive(process.pid) and time.monotonic() < limit:
        time.sleep(0.05)

    assert len(workers) > 2
    assert alive(process.pid) == []
    resumed = sites.run(params=f"{params},{PROCESSES}")
    assert resumed.code == 0, resumed.output
    assert models(sites) == models(finished)
