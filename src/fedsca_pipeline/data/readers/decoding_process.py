"""The child process of ``decoding``: a loop of requests on standard input and answers on standard output."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume

# Bytes; Linux allows no more to a user without privileges.
_PIPE = 2**20


def main() -> None:
    """Answer requests, one JSON line each, until standard input ends, as it does when the parent ends."""
    # Ctrl-C reaches all processes of a terminal; the parent decides what becomes of this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # What a library prints must not get among the answers.
    os.dup2(2, 1)
    if sys.platform == "linux":
        import fcntl

        # A small image then does not wait for the parent to read it. A user of very many pipes is not allowed more.
        with suppress(PermissionError):
            fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, _PIPE)
    for line in sys.stdin.buffer:
        _answer(json.loads(line), answers)
        answers.flush()


def _answer(request: dict[str, Any], answers: IO[bytes]) -> None:
    module, name = request["function"]
    # Imported before the limit, which is for the file.
    function = getattr(importlib.import_module(module), name).__wrapped__
    os.chdir(request["folder"])
    _limit(request["memory"], request["seconds"])
    try:
        found = function(*map(_from_json, request["args"]))
    except BrokenSampleError as error:
        _write(answers, {"broken": [error.unquoted, error.cure, error.quoted]})
        return
    finally:
        if sys.platform != "win32":
            # The parent may take its time to read the answer.
            signal.setitimer(signal.ITIMER_REAL, 0)
    values = found.voxels if isinstance(found, Volume) else found
    # An array of Fortran's order is sent as it lies.
    transposed = values.flags.f_contiguous and not values.flags.c_contiguous
    values = np.ascontiguousarray(values.T if transposed else values)
    header = {"dtype": values.dtype.str, "shape": values.shape, "transposed": transposed}
    if isinstance(found, Volume):
        header |= {
            "affine": found.affine.tolist(),
            "frame_of_reference": found.frame_of_reference,
            "alerts": found.alerts,
        }
    _write(answers, header)
    answers.write(values.data)


def _write(answers: IO[bytes], header: dict[str, Any]) -> None:
    answers.write(json.dumps(header).encode() + b"\n")


def _limit(memory: int, seconds: float) -> None:
    """Limit the address space to ``memory`` more bytes, and processor and wall time to ``seconds`` more."""
    if sys.platform == "win32":
        return
    import resource

    # The signal ends the process, also within native code.
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # A core dump would hold a patient's image.
    limits = {resource.RLIMIT_CPU: math.ceil(time.process_time() + seconds), resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb", buffering=0) as statm:  # noqa: PTH123 - a Path takes three times as long
            pages = int(statm.read(64).split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + memory
    for kind, limit in limits.items():
        _, most = resource.getrlimit(kind)
        resource.setrlimit(kind, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _from_json(value: Any) -> Any:
    """Return an argument that ``decoding`` made JSON of."""
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "path" in value:
        return Path(value["path"])
    if "numbers" in value:
        return dict(value["numbers"])
    # The voxels of a grid are never read, so they take no memory.
    voxels = np.broadcast_to(np.uint8(0), value["shape"])
    return Volume(voxels, np.array(value["affine"]), value["frame_of_reference"])


if __name__ == "__main__":
    main()
