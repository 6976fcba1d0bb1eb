"""The coordinator's end of the relay: starts a Flower run on the SuperLink and talks to its ServerApp."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.files import write_bytes
from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator.fleet import LinkLost, Node, Reply
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import engine_folder, environment
from fedsca_pipeline.flower.processes.lock import Held, locked

logger = logging.getLogger(__name__)

APP = Path(__file__).parents[1] / "app"
_CONNECTION = "coordinator"
# One look at the SuperLink; its own retries must not hold the coordinator for ever.
_CALL_SECONDS = 120.0
# Replies in one frame: their reasons, each of frames.LONGEST_REASON characters, must fit a frame's header as JSON.
_MOST_REPLIES = 32
# Until a run whose relay has not come is looked at.
_LOOK_SECONDS = 10.0


class RelayLink:
    """A link through one Flower run at a time, whose ServerApp is ``relay``."""

    def __init__(self, config: FlowerConfig) -> None:
        self._config = config
        self._home = config.home.resolve()
        self._engine = engine_folder(config.engine)
        self._listener = frames.listen(self._home / "relay.sock")
        self._line: socket.socket | None = None
        address = {"address": config.superlink, "root-certificates": str(config.authority.resolve())}
        lines = [f"{key} = {json.dumps(value)}" for key, value in address.items()]
        table = [f'[superlink]\ndefault = "{_CONNECTION}"', f"[superlink.{_CONNECTION}]", *lines]
        write_bytes(self._home / "config.toml", ("\n".join(table) + "\n").encode())

    def restore(self) -> None:
        """End what is left of the last run's relay and start a run of its own."""
        self._hang_up()
        run = self._start_run()
        until = time.monotonic() + self._config.connect
        while self._line is None:
            self._line = self._next_relay(run, until)

    def nodes(self) -> Mapping[str, Node]:
        """Return the connected nodes by name; one without a name was registered without ours and is nobody."""
        answer, _ = self._call({"ask": "nodes"})
        return {name: Node(id_, since) for name, id_, since in answer["nodes"] if name}

    def push(self, node: str, task: Mapping[str, Any], payload: bytes, ttl: float) -> str | None:
        """Send one message."""
        answer, _ = self._call({"ask": "push", "node": node, "task": dict(task), "ttl": ttl}, payload)
        return answer["id"]

    def pull(self, ids: Sequence[str]) -> Sequence[Reply]:
        """Return what has come back."""
        most = min(len(self._config.sites), _MOST_REPLIES)
        return [reply for at in range(0, len(ids), most) for reply in self._pull(ids[at : at + most])]

    def _pull(self, ids: Sequence[str]) -> list[Reply]:
        answer, payload = self._call({"ask": "pull", "ids": list(ids), "most": self._config.most_bytes})
        replies, place = [], 0
        for entry in answer["replies"]:
            part = payload[place : place + entry["bytes"]]
            place += entry["bytes"]
            replies.append(Reply(entry["id"], entry["node"], part, entry.get("answer", {}), entry.get("error")))
        return replies

    def close(self) -> None:
        """Hang up: the relay, and with it the Flower run, ends."""
        self._hang_up()
        self._listener.close()
        (self._home / "relay.sock").unlink(missing_ok=True)

    def _next_relay(self, run: str, until: float) -> socket.socket | None:
        """Return the line of a run's relay, or None if none, or another caller, has come within a while."""
        self._listener.settimeout(max(0.1, min(_LOOK_SECONDS, until - time.monotonic())))
        try:
            line, _ = self._listener.accept()
        except TimeoutError as error:
            if time.monotonic() >= until:
                raise LinkLost(f"Flower run {run} did not start its relay in {self._config.connect:.0f} s") from error
            self._refuse_ended(run)
            return None
        except OSError as error:
            raise LinkLost(f"Flower run {run} did not start its relay ({error!r})") from error
        if _is_relay_of(run, line):
            return line
        line.close()
        return None

    def _refuse_ended(self, run: str) -> None:
        (found,) = self._flwr("list", _CONNECTION, "--run-id", run)["runs"]
        if found["status"].startswith("finished"):
            raise LinkLost(f"Flower run {run} ended without its relay ({found.get('status-details')})")

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None

    def _call(self, header: Mapping[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        if self._line is None:
            raise LinkLost("there is no relay")
        try:
            frames.send(self._line, header, payload)
            # All sites' answers may come in one frame.
            return frames.receive(self._line, self._config.most_bytes * (len(self._config.sites) + 1))
        except (OSError, EOFError, frames.FrameError) as error:
            self._hang_up()
            raise LinkLost(f"the relay is gone ({error!r})") from error

    def _start_run(self) -> str:
        most = min(self._config.most_bytes * (len(self._config.sites) + 1), 2**62)
        settings = f"socket={json.dumps(str(self._home / 'relay.sock'))} most={most}"
        return str(self._flwr("run", str(APP), _CONNECTION, "--run-config", settings)["run-id"])

    def _flwr(self, *command: str) -> dict[str, Any]:
        """Return what a ``flwr`` command answers."""
        try:
            done = subprocess.run(  # noqa: S603 - no shell, and an engine that the coordinator has configured
                [str(self._engine / "flwr"), *command, "--format", "json"],
                env=environment(self._engine, self._home),
                capture_output=True,
                text=True,
                timeout=self._config.connect,
                check=False,
            )
            answer = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
            raise LinkLost(f"the SuperLink at {self._config.superlink} does not answer ({error})") from error
        if not answer.get("success"):
            raise LinkLost(f"the SuperLink at {self._config.superlink}: {answer.get('error-message') or done.stdout}")
        return answer


def _is_relay_of(run: str, line: socket.socket) -> bool:
    """Tell whether a run's relay has connected, and not that of an earlier run, which ends when it is hung up on."""
    line.settimeout(_CALL_SECONDS)
    try:
        hello, _ = frames.receive(line, 0)
    except (OSError, EOFError, frames.FrameError):
        return False
    return hello.get("run") == run


@contextmanager
def open_link(config: FlowerConfig) -> Iterator[RelayLink]:
    """Open the one link of this coordinator; leaving the block ends the Flower run.

    Raises:
        ConfigError: another command holds the link, the engine is missing, or the SuperLink cannot be reached.
    """
    try:
        with locked(config.home / "lock"), _link(config) as link:
            yield link
    except Held as error:
        raise ConfigError(
            f"flower.home: another command of this coordinator runs a federation through {config.home}; wait for "
            "its end, or stop it"
        ) from error


@contextmanager
def _link(config: FlowerConfig) -> Iterator[RelayLink]:
    try:
        link = RelayLink(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"flower: {error}") from error
    try:
        link.restore()
        yield link
    except LinkLost as error:
        raise ConfigError(
            f"flower.superlink: {error}; are flower-superlink and flower-superexec up there (docs/deployment.md)?"
        ) from error
    finally:
        link.close()
