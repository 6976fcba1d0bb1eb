"""Send and receive frames on a unix socket: a JSON header and a payload of bytes. Standard library only, no pickle."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_REASON = 2_000
"""Maximum number of characters in which a site says why it has no answer."""

_LENGTHS = struct.Struct("!IQ")
_MAX_HEADER = 1 << 20
_MAX_PATH = 100  # bytes; the kernel allows 108 on Linux, 104 on macOS


class FrameError(Exception):
    """A frame is malformed or too large. The connection cannot be used any more."""


def send(connection: socket.socket, header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Send one frame.

    Raises:
        OSError: the other end has closed the connection.
    """
    text = json.dumps(header).encode()
    connection.sendall(_LENGTHS.pack(len(text), len(payload)) + text)
    if payload:
        connection.sendall(payload)


def receive(connection: socket.socket, most: int) -> tuple[dict[str, Any], bytes]:
    """Return the next frame's header and payload.

    Args:
        connection: connected stream socket.
        most: largest payload allowed, in bytes.

    Raises:
        EOFError: the other end has closed the connection.
        FrameError: the frame is larger than allowed, or its header is not a JSON object.
        OSError: the connection is broken, or the time limit of the socket has passed.
    """
    text_length, length = _LENGTHS.unpack(_receive_exactly(connection, _LENGTHS.size))
    if text_length > _MAX_HEADER or length > most:
        raise FrameError(f"a frame of {text_length} + {length} bytes is larger than the {most} allowed")
    try:
        header = json.loads(_receive_exactly(connection, text_length))
    except ValueError as error:
        raise FrameError(f"the header of a frame is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FrameError("the header of a frame is not a JSON object")
    return header, _receive_exactly(connection, length)


def connect(path: Path | str, seconds: float | None = None) -> socket.socket:
    """Return a connection to the socket at ``path``. Each operation may take ``seconds`` (None: no limit).

    Raises:
        OSError: no process listens at ``path``.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(seconds)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at ``path``, and make its folder accessible to this user only.

    Raises:
        ValueError: the path is too long for a unix socket.
    """
    if len(str(path).encode()) > _MAX_PATH:
        raise ValueError(f"{path}: too long for a unix socket (at most {_MAX_PATH} bytes); use a shorter path")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()
    return listener


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        parts += part
    return bytes(parts)
