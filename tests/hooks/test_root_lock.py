"""One command at a time writes below a data root."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsca_pipeline.errors import UnavailableError
from fedsca_pipeline.hooks.root_lock import RootLock

HOLD = """
import sys
from pathlib import Path
from fedsca_pipeline.hooks.root_lock import RootLock
lock = RootLock()
lock.take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
{end}
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, until it reads a line; then it does what the parameter says."""
    command = [sys.executable, "-c", HOLD.format(end=getattr(request, "param", "")), str(tmp_path), "--a=b  c"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_command_is_refused_with_the_first_one_s_pid_command_and_start(tmp_path: Path, holder) -> None:
    with pytest.raises(UnavailableError) as refused:
        RootLock().take(tmp_path)

    said = str(refused.value)
    assert said.startswith(f"{tmp_path}: in use by process {holder.pid} (kedro {tmp_path} --a=b c), since ")
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it ends", said)
    assert "\n" not in said


@pytest.mark.parametrize(
    "holder", ["lock.after_pipeline_run()", "lock.on_pipeline_error()", "lock.release()"], indirect=True
)
def test_the_lock_goes_with_the_run_however_it_ends(tmp_path: Path, holder) -> None:
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "ended\n"

    RootLock().take(tmp_path)


def test_the_lock_goes_with_a_killed_process(tmp_path: Path, holder) -> None:
    holder.kill()
    holder.wait()

    RootLock().take(tmp_path)


def test_a_process_does_not_lock_itself_out_after_an_interrupted_run(tmp_path: Path) -> None:
    lock = RootLock()
    lock.take(tmp_path)
    lock.take(tmp_path)

    with pytest.raises(UnavailableError):
        RootLock().take(tmp_path)


def test_another_root_is_free(tmp_path: Path, holder) -> None:
    (tmp_path / "other").mkdir()

    RootLock().take(tmp_path / "other")
