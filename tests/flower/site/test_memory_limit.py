"""Out-of-memory errors of the real libraries are recognised and reported with the fix."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsca_pipeline.errors import DataError
from fedsca_pipeline.flower.site.memory_limit import OUT_OF_MEMORY, describe_exit, is_out_of_memory

TOO_MUCH = 2**56


def wrapped() -> None:
    try:
        np.empty(TOO_MUCH, np.uint8)
    except MemoryError as error:
        raise DataError("image.png: cannot be read") from error


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, np.uint8),
        lambda: mmap.mmap(-1, TOO_MUCH),
        lambda: bytearray(TOO_MUCH),
        wrapped,
    ],
)
def test_a_failed_allocation_is_recognised_as_out_of_memory(allocate) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError, DataError)) as raised:
        allocate()

    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("fail", [lambda: torch.zeros(2) @ torch.zeros(3), Path("/no/such/file").read_bytes])
def test_other_errors_are_not_out_of_memory(fail) -> None:
    with pytest.raises((RuntimeError, OSError)) as raised:
        fail()

    assert not is_out_of_memory(raised.value)


def test_a_process_cannot_allocate_more_than_its_limit() -> None:
    code = (
        "from fedsca_pipeline.flower.site.memory_limit import limit_memory; limit_memory(0.25); "
        "held = bytearray(2**26); print('within', flush=True); bytearray(2**28)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == "within\n"
    assert "MemoryError" in done.stderr


def test_with_its_limit_lifted_a_process_can_allocate_again() -> None:
    code = (
        "from fedsca_pipeline.flower.site.memory_limit import lift_memory_limit, limit_memory; limit_memory(0.25)\n"
        "try: bytearray(2**28)\n"
        "except MemoryError: lift_memory_limit(); print(len(bytearray(2**28)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == f"{2**28}\n", done.stderr


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, -signal.SIGKILL, -signal.SIGABRT])
@pytest.mark.parametrize(("limit", "allowed"), [(None, "sets no limit"), (1.5, "allows 1.5 GiB")])
def test_if_memory_may_be_the_cause_the_key_and_the_fix_are_named(status, limit, allowed) -> None:
    assert f"resources.memory in the site's YAML file {allowed}; raise it" in describe_exit(status, limit)


def test_any_other_exit_is_reported_with_its_status() -> None:
    assert describe_exit(3, 1.0) == "its worker died (exit code 3)"
