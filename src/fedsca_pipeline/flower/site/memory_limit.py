"""What a site's worker may take of the machine's memory, and how it is known that it needed more."""

from __future__ import annotations

import errno
import resource
import signal

OUT_OF_MEMORY = 112
"""Exit status of a worker that could not have the memory it asked for."""

# PyTorch has no class of its own for this on the CPU, nor has oneDNN; the phrases are theirs, glibc's and Python's.
_PHRASES = (
    "allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "can't start new thread",
    "could not create a primitive",
)


def limit_memory(gib: float) -> None:
    """Refuse this process what it asks for beyond ``gib`` GiB.

    What counts is memory of its own (Linux: ``RLIMIT_DATA``), not address space, of which libraries reserve more than
    they use.
    """
    most, (_, machine) = int(gib * 2**30), resource.getrlimit(resource.RLIMIT_DATA)
    unlimited = machine == resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_DATA, (most if unlimited else min(most, machine), machine))


def lift_limit() -> None:
    """Let this process have what the machine gives: to tell of a shortage takes memory, too."""
    _, machine = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (machine, machine))


def is_shortage(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised for, is that memory was refused."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES):
            return True
        error = error.__cause__ or error.__context__
    return False


def fate(status: int, gib: float | None) -> str:
    """Return what became of a worker with this exit status, and the cure where memory may be why.

    ``gib`` is ``resources.memory`` of its site.
    """
    allowed = "sets no limit" if gib is None else f"allows {gib:g} GiB"
    cure = f"resources.memory in the site's YAML file {allowed}; raise it where the machine has more"
    cure += ", or lower training.batch_size or preprocessing.image_size at the coordinator"
    if status == OUT_OF_MEMORY:
        return f"its worker ran out of memory ({cure})"
    if status < 0:
        name = signal.Signals(-status).name
        return f"its worker was ended by {name}; if the system ended it because memory was short: {cure}"
    return f"its worker died (exit code {status})"
