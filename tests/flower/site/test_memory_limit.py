"""Refused memory is recognised by what the libraries really raise, and told with its cure."""

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
from fedsca_pipeline.flower.site.memory_limit import OUT_OF_MEMORY, fate, is_shortage

TOO_MUCH = 2**56


def wrapped() -> None:
    try:
        np.empty(TOO_MUCH, np.uint8)
    except MemoryError as error:
        raise DataError("image.png: cannot be read") from error


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, np.uint8),
        lambda: mmap.mmap(-1, TOO_MUCH),
        lambda: bytearray(TOO_MUCH),
        wrapped,
    ],
)
def test_memory_that_is_refused_is_a_shortage(take) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError, DataError)) as raised:
        take()

    assert is_shortage(raised.value)


@pytest.mark.parametrize("take", [lambda: torch.zeros(2) @ torch.zeros(3), Path("/no/such/file").read_bytes])
def test_nothing_else_is(take) -> None:
    with pytest.raises((RuntimeError, OSError)) as raised:
        take()

    assert not is_shortage(raised.value)


def test_beyond_its_limit_a_process_gets_none_whatever_the_machine_has() -> None:
    code = (
        "from fedsca_pipeline.flower.site.memory_limit import limit_memory; limit_memory(0.25); "
        "kept = bytearray(2**26); print('within', flush=True); bytearray(2**28)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == "within\n"
    assert "MemoryError" in done.stderr


def test_with_its_limit_lifted_it_can_tell_what_happened() -> None:
    code = (
        "from fedsca_pipeline.flower.site.memory_limit import lift_limit, limit_memory; limit_memory(0.25)\n"
        "try: bytearray(2**28)\n"
        "except MemoryError: lift_limit(); print(len(bytearray(2**28)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout == f"{2**28}\n", done.stderr


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, -signal.SIGKILL, -signal.SIGABRT])
@pytest.mark.parametrize(("limit", "said"), [(None, "sets no limit"), (1.5, "allows 1.5 GiB")])
def test_where_memory_may_be_why_the_key_and_the_cure_are_named(status, limit, said) -> None:
    assert f"resources.memory in the site's YAML file {said}; raise it" in fate(status, limit)


def test_of_another_end_the_status_is_told() -> None:
    assert fate(3, 1.0) == "its worker died (exit code 3)"
