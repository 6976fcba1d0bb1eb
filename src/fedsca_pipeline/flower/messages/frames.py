"""Frames on a unix socket: a JSON header and a payload of bytes. Standard library only; nothing is pickled."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST_REASON = 2_000
"""Characters in which a site may say why it has no answer."""

_LENGTHS = struct.Struct("!IQ")
_MOST_HEADER = 1 << 20
_LONGEST_PATH = 100  # bytes; the kernel's limit is 108 on Linux, 104 on macOS


class FrameError(Exception):
    """A frame is malformed or larger than allowed; the connection cannot be used any more."""


def send(line: socket.socket, header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Send one frame.

    Raises:
        OSError: the other end is gone.
    """
    text = json.dumps(header).encode()
    line.sendall(_LENGTHS.pack(len(text), len(payload)) + text)
    if payload:
        line.sendall(payload)


def receive(line: socket.socket, most: int) -> tuple[dict[str, Any], bytes]:
    """Return the next frame's header and payload.

    Args:
        line: connected stream socket.
        most: bytes that a payload may have.

    Raises:
        EOFError: the other end has closed the connection.
        FrameError: the frame is larger than allowed, or its header is no JSON object.
        OSError: the other end is gone, or the socket's time limit has passed.
    """
    text_length, length = _LENGTHS.unpack(_exactly(line, _LENGTHS.size))
    if text_length > _MOST_HEADER or length > most:
        raise FrameError(f"a frame of {text_length} + {length} bytes is larger than the {most} allowed")
    try:
        header = json.loads(_exactly(line, text_length))
    except ValueError as error:
        raise FrameError(f"a frame's header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise FrameError("a frame's header is no JSON object")
    return header, _exactly(line, length)


def connect(path: Path | str, seconds: float | None = None) -> socket.socket:
    """Return a connection to the socket at ``path``, whose every operation may take ``seconds`` (None: any time).

    Raises:
        OSError: nobody listens there.
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(seconds)
    try:
        line.connect(str(path))
    except OSError:
        line.close()
        raise
    return line


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at ``path``, in a folder that from now on only this user may enter.

    Raises:
        ValueError: the path is too long for a unix socket.
    """
    if len(str(path).encode()) > _LONGEST_PATH:
        raise ValueError(f"{path}: too long for a unix socket (at most {_LONGEST_PATH} bytes); choose a shorter folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()
    return listener


def _exactly(line: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = line.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError("the connection was closed")
        parts += part
    return bytes(parts)
