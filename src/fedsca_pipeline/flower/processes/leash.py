"""Run commands that end with the process that started them, even if that process is killed with SIGKILL.

Run as a script, this file is the leash: a process between the owner and the command. It starts the command in its own
process group and ends the group when its standard input closes. That input is a pipe from the owner, which the kernel
closes when the owner ends. The file imports only the standard library, so that the leash starts in milliseconds.
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

# Signals for the whole group: the command handles them, and the leash waits until it ends.
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LeashedProcess:
    """A command on a leash, with its process group. The group ends when this object is deleted.

    Args:
        command: command line; its standard input is empty.
        env: environment variables; None: those of this process.
        stop_seconds: seconds between SIGTERM and SIGKILL when the command is ended; 0: SIGKILL at once.
        options: further options of ``subprocess.Popen``, such as ``stdout`` and ``pass_fds``.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        stop_seconds: float = 10.0,
        **options: Any,
    ) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - no shell
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(stop_seconds), *command],
            env=None if env is None else dict(env),
            stdin=subprocess.PIPE,
            start_new_session=True,
            **options,
        )

    @property
    def pid(self) -> int:
        """Process id of the leash, which is also the id of the group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status of the command (negative: a signal), or None while it runs."""
        return None if self._process.poll() is None else self._clean_up()

    def wait(self, seconds: float | None = None) -> int:
        """Wait until the command ends and return its exit status.

        Raises:
            subprocess.TimeoutExpired: the command still runs after ``seconds``.
        """
        self._process.wait(seconds)
        return self._clean_up()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the group."""
        if self._process.poll() is None:
            os.killpg(self.pid, number)

    def request_stop(self) -> None:
        """Ask the leash to end the command, and return at once."""
        self._close_pipe()

    def end(self) -> int:
        """End the command and its group, and return its exit status."""
        self.request_stop()
        return self.wait()

    def _close_pipe(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _clean_up(self) -> int:
        """Kill the rest of the group, and return the exit status. The group can outlive the command and the leash."""
        self._close_pipe()
        # macOS answers EPERM for a group of zombies.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.returncode


def hold(owner: int, stop_seconds: float, command: Sequence[str]) -> int:
    """Run a command until it ends or standard input closes, and return its exit status."""
    for number in _FORWARDED:
        # Not SIG_IGN, because the command would inherit it.
        signal.signal(number, lambda *_: None)
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)  # noqa: S603 - no shell
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    threading.Thread(target=_end_with_owner, args=(child, stop_seconds), daemon=True).start()
    status = child.wait()
    if os.getppid() != owner:
        # The owner has ended, so the leash ends the rest of the group.
        os.killpg(0, signal.SIGKILL)
    return status


def _end_with_owner(child: subprocess.Popen, stop_seconds: float) -> None:
    os.read(0, 1)
    if stop_seconds:
        os.killpg(0, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(stop_seconds)
    child.kill()


def _exit_like(status: int) -> None:
    """End this process with the exit status or the signal of the command."""
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -status in _FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    _exit_like(hold(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
