"""A leashed process ends with its owner, however the owner ends, and leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedsca_pipeline.flower.processes.leash import LeashedProcess

# A command that starts a child and writes both process ids to a file.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
ids = pathlib.Path(sys.argv[1])
ids.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
ids.with_suffix(".new").rename(ids)
if "brief" in sys.argv:
    sys.exit(7)
time.sleep(600)
"""
OWNER = """
import sys, time
from fedsca_pipeline.flower.processes.leash import LeashedProcess
leashed = LeashedProcess([sys.executable, *sys.argv[2:]], stop_seconds=float(sys.argv[1]))
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., list[str]]:
    """Returns the arguments of a command with a child; options: ``deaf`` to SIGTERM, and ``brief``."""
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    return lambda *words: [str(script), str(tmp_path / "ids"), *words]


@pytest.fixture
def members(tmp_path: Path) -> Callable[[], list[int]]:
    """Waits until command and child run, and returns their process ids."""

    def find() -> list[int]:
        until(lambda: (tmp_path / "ids").is_file())
        return [int(number) for number in (tmp_path / "ids").read_text().split()]

    return find


def until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def gone(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("stop_seconds", "words"), [("30", ()), ("0.2", ("deaf",)), ("0", ("deaf",))])
def test_after_the_owner_is_killed_neither_the_command_nor_its_children_run(
    family, members, stop_seconds, words
) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, stop_seconds, *family(*words)])
    processes = members()
    processes += [child.pid for child in psutil.Process(owner.pid).children()]

    owner.kill()
    owner.wait()

    until(lambda: all(map(gone, processes)))


def test_a_command_that_ends_by_itself_returns_its_status_and_leaves_no_process(family, members) -> None:
    leashed = LeashedProcess([sys.executable, *family("brief")])
    processes = members()

    assert leashed.wait(30) == 7
    until(lambda: all(map(gone, processes)))


def test_after_the_leash_is_killed_the_owner_ends_the_command(family, members) -> None:
    leashed = LeashedProcess([sys.executable, *family()])
    processes = members()

    psutil.Process(leashed.pid).kill()

    assert leashed.wait(30) == -signal.SIGKILL
    until(lambda: all(map(gone, processes)))


@pytest.mark.parametrize(
    ("words", "stop_seconds", "status"), [((), 30.0, -signal.SIGTERM), (("deaf",), 0.2, -signal.SIGKILL)]
)
def test_end_sends_sigterm_first_and_kills_a_command_that_ignores_it(
    family, members, words, stop_seconds, status
) -> None:
    leashed = LeashedProcess([sys.executable, *family(*words)], stop_seconds=stop_seconds)
    processes = members()

    assert leashed.end() == status
    until(lambda: all(map(gone, processes)))
    assert leashed.poll() == status


def test_a_signal_reaches_the_command(family, members) -> None:
    leashed = LeashedProcess([sys.executable, "-c", "import signal; signal.sigwait([signal.SIGINT])"])
    until(lambda: psutil.Process(leashed.pid).children())
    leashed.send(signal.SIGINT)

    assert leashed.wait(30) in (0, -signal.SIGINT, 1)


def test_a_missing_command_fails_with_its_name(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("w") as errors:
        status = LeashedProcess(["/no/such/command"], stderr=errors).wait(30)

    assert status == 1
    assert "/no/such/command: No such file" in (tmp_path / "errors").read_text()
