"""What is on a leash ends with its owner, whatever that died of, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fedsca_pipeline.flower.processes.leash import Leashed

# A command that starts another one, and notes both.
FAMILY = """
import os, pathlib, signal, subprocess, sys, time
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
noted = pathlib.Path(sys.argv[1])
noted.with_suffix(".new").write_text(f"{os.getpid()} {child.pid}")
noted.with_suffix(".new").rename(noted)
if "brief" in sys.argv:
    sys.exit(7)
time.sleep(600)
"""
OWNER = """
import sys, time
from fedsca_pipeline.flower.processes.leash import Leashed
leashed = Leashed([sys.executable, *sys.argv[2:]], patience=float(sys.argv[1]))
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a command that starts another; words are ``deaf`` to SIGTERM, and ``brief``."""
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    return lambda *words: [str(script), str(tmp_path / "noted"), *words]


@pytest.fixture
def members(tmp_path: Path) -> Callable[[], list[int]]:
    """Waits until command and child are there; returns their numbers."""

    def find() -> list[int]:
        until(lambda: (tmp_path / "noted").is_file())
        return [int(number) for number in (tmp_path / "noted").read_text().split()]

    return find


def until(ready: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def gone(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("patience", "words"), [("30", ()), ("0.2", ("deaf",)), ("0", ("deaf",))])
def test_a_killed_owner_leaves_neither_the_command_nor_what_it_has_started(family, members, patience, words) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, patience, *family(*words)])
    processes = members()
    processes += [child.pid for child in psutil.Process(owner.pid).children()]

    owner.kill()
    owner.wait()

    until(lambda: all(map(gone, processes)))


def test_a_command_that_ends_by_itself_gives_its_status_and_leaves_nothing(family, members) -> None:
    leashed = Leashed([sys.executable, *family("brief")])
    processes = members()

    assert leashed.wait(30) == 7
    until(lambda: all(map(gone, processes)))


def test_one_whose_leash_was_killed_is_ended_by_its_owner(family, members) -> None:
    leashed = Leashed([sys.executable, *family()])
    processes = members()

    psutil.Process(leashed.pid).kill()

    assert leashed.wait(30) == -signal.SIGKILL
    until(lambda: all(map(gone, processes)))


@pytest.mark.parametrize(
    ("words", "patience", "status"), [((), 30.0, -signal.SIGTERM), (("deaf",), 0.2, -signal.SIGKILL)]
)
def test_to_end_it_is_to_ask_first_and_to_kill_what_does_not_listen(family, members, words, patience, status) -> None:
    leashed = Leashed([sys.executable, *family(*words)], patience=patience)
    processes = members()

    assert leashed.end() == status
    until(lambda: all(map(gone, processes)))
    assert leashed.poll() == status


def test_a_signal_reaches_the_command(family, members) -> None:
    leashed = Leashed([sys.executable, "-c", "import signal; signal.sigwait([signal.SIGINT])"])
    until(lambda: psutil.Process(leashed.pid).children())
    leashed.send(signal.SIGINT)

    assert leashed.wait(30) in (0, -signal.SIGINT, 1)


def test_a_command_that_is_not_there_ends_with_its_name(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said:
        status = Leashed(["/no/such/command"], stderr=said).wait(30)

    assert status == 1
    assert "/no/such/command: No such file" in (tmp_path / "said").read_text()
