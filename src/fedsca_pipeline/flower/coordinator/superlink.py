"""The link through the SuperLink: starts a Flower run and talks to its ServerApp, the relay."""

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
from fedsca_pipeline.files import LockHeld, open_locked, write_bytes
from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator.link import LinkLost, Node, Reply
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import engine_folder, environment

logger = logging.getLogger(__name__)

APP = Path(__file__).parents[1] / "app"
_CONNECTION_NAME = "coordinator"
# Time for the first frame of a relay.
_HELLO_SECONDS = 120.0
# Replies per frame: their reasons, each of up to frames.MAX_REASON characters, must fit into the JSON header.
_MAX_REPLIES = 32
# Interval at which a run is checked whose relay has not connected.
_CHECK_SECONDS = 10.0


class RelayLink:
    """A link through one Flower run at a time, whose ServerApp is ``relay``."""

    def __init__(self, config: FlowerConfig) -> None:
        self._config = config
        self._home = config.home.resolve()
        self._engine = engine_folder(config.engine)
        self._listener = frames.listen(self._home / "relay.sock")
        self._connection: socket.socket | None = None
        address = {"address": config.superlink, "root-certificates": str(config.authority.resolve())}
        lines = [f"{key} = {json.dumps(value)}" for key, value in address.items()]
        table = [f'[superlink]\ndefault = "{_CONNECTION_NAME}"', f"[superlink.{_CONNECTION_NAME}]", *lines]
        write_bytes(self._home / "config.toml", ("\n".join(table) + "\n").encode())

    def reconnect(self) -> None:
        """Disconnect the relay of the last run, start a new run and wait for its relay."""
        self._disconnect()
        run = self._start_run()
        until = time.monotonic() + self._config.connect
        while self._connection is None:
            self._connection = self._accept_relay(run, until)

    def nodes(self) -> Mapping[str, Node]:
        """Return the connected nodes by name, without those that were registered without a name."""
        answer, _ = self._call({"ask": "nodes"})
        return {name: Node(id_, since) for name, id_, since in answer["nodes"] if name}

    def push(self, node: str, task: Mapping[str, Any], payload: bytes, ttl: float) -> str | None:
        """Send one message; return its id, or None if the SuperLink did not accept it."""
        answer, _ = self._call({"ask": "push", "node": node, "task": dict(task), "ttl": ttl}, payload)
        return answer["id"]

    def pull(self, ids: Sequence[str]) -> Sequence[Reply]:
        """Return the replies to these messages that arrived since the last call."""
        size = min(len(self._config.sites), _MAX_REPLIES)
        return [reply for at in range(0, len(ids), size) for reply in self._pull(ids[at : at + size])]

    def _pull(self, ids: Sequence[str]) -> list[Reply]:
        answer, payload = self._call({"ask": "pull", "ids": list(ids), "most": self._config.max_message_bytes})
        replies, offset = [], 0
        for entry in answer["replies"]:
            part = payload[offset : offset + entry["bytes"]]
            offset += entry["bytes"]
            replies.append(Reply(entry["id"], entry["node"], part, entry.get("answer", {}), entry.get("error")))
        return replies

    def close(self) -> None:
        """Disconnect the relay, which ends the Flower run."""
        self._disconnect()
        self._listener.close()
        (self._home / "relay.sock").unlink(missing_ok=True)

    def _accept_relay(self, run: str, until: float) -> socket.socket | None:
        """Return the connection of a run's relay; None if nothing, or another process, connects in a while."""
        self._listener.settimeout(max(0.1, min(_CHECK_SECONDS, until - time.monotonic())))
        try:
            connection, _ = self._listener.accept()
        except TimeoutError as error:
            if time.monotonic() >= until:
                raise LinkLost(f"Flower run {run} did not start its relay in {self._config.connect:.0f} s") from error
            self._check_running(run)
            return None
        except OSError as error:
            raise LinkLost(f"Flower run {run} did not start its relay ({error!r})") from error
        if _is_relay_of(run, connection):
            return connection
        connection.close()
        return None

    def _check_running(self, run: str) -> None:
        (found,) = self._flwr("list", _CONNECTION_NAME, "--run-id", run)["runs"]
        if found["status"].startswith("finished"):
            raise LinkLost(f"Flower run {run} ended without its relay ({found.get('status-details')})")

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _call(self, header: Mapping[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        if self._connection is None:
            raise LinkLost("no relay is connected")
        try:
            frames.send(self._connection, header, payload)
            # One frame may hold the answers of all sites.
            return frames.receive(self._connection, self._config.max_message_bytes * (len(self._config.sites) + 1))
        except (OSError, EOFError, frames.FrameError) as error:
            self._disconnect()
            raise LinkLost(f"the relay has disconnected ({error!r})") from error

    def _start_run(self) -> str:
        most = min(self._config.max_message_bytes * (len(self._config.sites) + 1), 2**62)
        settings = f"socket={json.dumps(str(self._home / 'relay.sock'))} most={most}"
        return str(self._flwr("run", str(APP), _CONNECTION_NAME, "--run-config", settings)["run-id"])

    def _flwr(self, *command: str) -> dict[str, Any]:
        """Return the JSON that a ``flwr`` command prints."""
        try:
            done = subprocess.run(  # noqa: S603 - no shell; the executable is in the configured engine
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


def _is_relay_of(run: str, connection: socket.socket) -> bool:
    """Return whether a connection comes from the relay of this run, not from that of an earlier run."""
    connection.settimeout(_HELLO_SECONDS)
    try:
        hello, _ = frames.receive(connection, 0)
    except (OSError, EOFError, frames.FrameError):
        return False
    return hello.get("run") == run


@contextmanager
def open_link(config: FlowerConfig) -> Iterator[RelayLink]:
    """Open the link of this coordinator. At the end of the block the Flower run ends.

    Raises:
        ConfigError: another command uses the link, the engine is missing, or the SuperLink cannot be reached.
    """
    try:
        with open_locked(config.home / "lock"), _link(config) as link:
            yield link
    except LockHeld as error:
        raise ConfigError(
            f"flower.home: another command of this coordinator runs a federation through {config.home}; wait until "
            "it ends, or stop it"
        ) from error


@contextmanager
def _link(config: FlowerConfig) -> Iterator[RelayLink]:
    try:
        link = RelayLink(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"flower: {error}") from error
    try:
        link.reconnect()
        yield link
    except LinkLost as error:
        raise ConfigError(
            f"flower.superlink: {error}; are flower-superlink and flower-superexec running (docs/deployment.md)?"
        ) from error
    finally:
        link.close()
