"""Limit the memory of a site's worker, and recognise errors and exit statuses caused by too little memory."""

from __future__ import annotations

import errno
import resource
import signal

OUT_OF_MEMORY = 112
"""Exit status of a worker that ran out of memory."""

# Texts of out-of-memory errors from PyTorch on the CPU, oneDNN, glibc and Python, which raise RuntimeError.
_PHRASES = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",
)


def limit_memory(gib: float) -> None:
    """Limit this process to ``gib`` GiB of private memory.

    The limit is on data (Linux: ``RLIMIT_DATA``), not on address space, since libraries reserve more than they use.
    """
    wanted, (_, hard) = int(gib * 2**30), resource.getrlimit(resource.RLIMIT_DATA)
    unlimited = hard == resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if unlimited else min(wanted, hard), hard))


def lift_memory_limit() -> None:
    """Remove the limit of this process, so that it has memory to report the error."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or an error that caused it, means that memory could not be allocated."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_exit(status: int, gib: float | None) -> str:
    """Return why a worker with this exit status ended, and the fix if memory may be the cause.

    ``gib`` is ``resources.memory`` of the site.
    """
    allowed = "sets no limit" if gib is None else f"allows {gib:g} GiB"
    fix = f"resources.memory in the site's YAML file {allowed}; raise it if the machine has more"
    fix += ", or lower training.batch_size or preprocessing.image_size at the coordinator"
    if status == OUT_OF_MEMORY:
        return f"its worker ran out of memory ({fix})"
    if status < 0:
        name = signal.Signals(-status).name
        return f"its worker was ended by {name}; if the system ended it for lack of memory: {fix}"
    return f"its worker died (exit code {status})"
