"""Processes that do not outlive the one that started them, however that ends, SIGKILL included.

Run as a script, this file is the leash: it starts a command in its own process group, and ends that when its standard
input closes, a pipe from the owner; the kernel closes it with the owner, whatever the owner died of. Standard library
only, and nothing of the package, so that it starts in milliseconds.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

# What may be sent to the whole group: the command gets it too, and the leash waits for what it does about it.
_FOR_THE_COMMAND = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Leashed:
    """A command on a leash, with all that it starts in its group. Whoever drops this object ends them.

    Args:
        command: to start; its standard input is empty.
        surroundings: its environment; None: this process's.
        patience: seconds between SIGTERM and SIGKILL when it is ended; 0: SIGKILL at once.
        options: more of ``subprocess.Popen``, such as ``stdout`` and ``pass_fds``.
    """

    def __init__(
        self,
        command: Sequence[str],
        surroundings: Mapping[str, str] | None = None,
        *,
        patience: float = 10.0,
        **options: Any,
    ) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - no shell
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(patience), *command],
            env=None if surroundings is None else dict(surroundings),
            stdin=subprocess.PIPE,
            start_new_session=True,
            **options,
        )

    @property
    def pid(self) -> int:
        """Of the leash, which is the number of the group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the command's exit status (the negative number of a signal), or None while it runs."""
        return None if self._process.poll() is None else self._cleared()

    def wait(self, seconds: float | None = None) -> int:
        """Return the exit status once the command has ended; raises ``subprocess.TimeoutExpired``."""
        self._process.wait(seconds)
        return self._cleared()

    def send(self, number: signal.Signals) -> None:
        """Send the group a signal."""
        if self._process.poll() is None:
            os.killpg(self.pid, number)

    def let_go(self) -> None:
        """Let the leash end the command, as if its owner had died, and do not wait for that."""
        self._process.stdin.close()

    def end(self) -> int:
        """End the command, and return its exit status; nothing of the group is left."""
        self.let_go()
        return self.wait()

    def _cleared(self) -> int:
        """End what the command has left behind, and what has outlived a leash that was killed."""
        self._process.stdin.close()
        # EPERM is what macOS says of a group of zombies.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.returncode


def hold(owner: int, patience: float, command: Sequence[str]) -> int:
    """Run a command until it ends or standard input closes; return its exit status."""
    for number in _FOR_THE_COMMAND:
        # Not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)  # noqa: S603 - no shell
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    threading.Thread(target=_end_with_the_owner, args=(child, patience), daemon=True).start()
    status = child.wait()
    if os.getppid() != owner:
        # Nobody else is left to end what the command has started.
        os.killpg(0, signal.SIGKILL)
    return status


def _end_with_the_owner(child: subprocess.Popen, patience: float) -> None:
    os.read(0, 1)
    if patience:
        os.killpg(0, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)
    child.kill()


def _leave_as(status: int) -> None:
    """End as the command has ended."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status in _FOR_THE_COMMAND:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    _leave_as(hold(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
