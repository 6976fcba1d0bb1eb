"""A stranger at the public port of a federation on loopback: idle connections, and bodies that are not finished."""

from __future__ import annotations

import http.client
import re
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from demo import LocalFederation


def peak_memory(federation: LocalFederation, name: str) -> int:
    """Return the sum of the largest resident memories so far of a part's processes, in bytes."""
    total = 0
    for process in psutil.Process(federation.processes[name].pid).children(recursive=True):
        status = Path(f"/proc/{process.pid}/status").read_text()
        total += int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    return total


def public_key(federation: LocalFederation, site: str) -> str:
    """Return the header by which nginx recognises a registered site."""
    return (federation.certificates / "hospitals" / f"{site}.map").read_text().split('"')[1]


def connect(federation: LocalFederation) -> http.client.HTTPSConnection:
    """Return an open connection to the public port."""
    trusted = ssl.create_default_context(cafile=str(federation.certificates / "ca.crt"))
    connection = http.client.HTTPSConnection("localhost", federation.public_port, context=trusted, timeout=60)
    connection.connect()
    return connection


def begin(connection: http.client.HTTPSConnection, path: str, key: str, length: int) -> None:
    """Send the header of a request with a body of ``length`` bytes; without a key if ``key`` is empty."""
    connection.putrequest("POST", path)
    connection.putheader("Content-Type", "application/protobuf")
    if key:
        connection.putheader("flwr-public-key", key)
    connection.putheader("Content-Length", str(length))
    connection.endheaders()


def push(federation: LocalFederation, key: str, length: int, call: str = "push-object") -> http.client.HTTPSConnection:
    """Send a request with a body of ``length`` bytes, of which the last is held back; return the connection."""
    connection = connect(federation)
    begin(connection, f"/v1/fleet/{call}", key, length)
    # Tag and length of the field object_content, so that the SuperLink reads the body as a message.
    content = length - 5
    head = bytes([0x22, *(content >> shift & 127 | 128 for shift in (0, 7, 14)), content >> 21])
    # nginx may have refused the request and closed the connection.
    with suppress(ConnectionError):
        connection.send(head + bytes(content - 1))
    return connection


def answers(connections: Sequence[http.client.HTTPSConnection]) -> list[int]:
    """Send the last bytes of all bodies at once, and return the statuses of the answers."""
    for connection in connections:
        with suppress(ConnectionError):
            connection.send(b"\0")
    return [connection.getresponse().status for connection in connections]


def besiege(federation: LocalFederation, stop: threading.Event) -> int:
    """Hold 200 connections until ``stop``; return how often. nginx closes them after 10 s, so they are opened again."""
    times = 0
    while not stop.is_set():
        with held([connect(federation) for _ in range(200)]):
            times += 1
            stop.wait(9.0)
    return times


def bombard(federation: LocalFederation, key: str, length: int, stop: threading.Event) -> Counter[int]:
    """Push 32 bodies at once until ``stop``; return how often which status was the answer."""
    found: Counter[int] = Counter()
    while not stop.is_set():
        with held([push(federation, key, length) for _ in range(32)]) as bodies:
            found.update(answers(bodies))
        stop.wait(9.0)
    return found


@contextmanager
def held(connections: list[http.client.HTTPSConnection]) -> Iterator[list[http.client.HTTPSConnection]]:
    """Close the connections at the end of the block."""
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()
