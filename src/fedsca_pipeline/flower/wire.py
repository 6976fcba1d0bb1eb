"""The record of the wire: one JSON line a message, at either end, of what it held; never of values."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.envelope import outline


class WireLog:
    """Appends to one file; one process writes to it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, way: Literal["down", "up"], kind: str, round_: int, site: str, payload: bytes, most: int) -> None:
        """Record a message: ``down`` to the site, ``up`` from it."""
        entry = {
            "time": round(time.time(), 3),
            "way": way,
            "kind": kind,
            "round": round_,
            "site": site,
            "bytes": len(payload),
            "sha256": hashlib.sha256(payload).hexdigest(),
            **_content(kind, payload, most),
        }
        with os.fdopen(os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
            file.write(json.dumps(entry) + "\n")


def _tensors(payload: bytes, most: int) -> dict[str, Any]:
    return outline(payload, max_bytes=most)


def _keys(payload: bytes, _most: int) -> dict[str, Any]:
    value = json.loads(payload) if payload else {}
    return {"keys": sorted(value) if isinstance(value, dict) else type(value).__name__}


_CONTENTS: Mapping[str, Callable[[bytes, int], dict[str, Any]]] = MappingProxyType({"round": _tensors})


def _content(kind: str, payload: bytes, most: int) -> dict[str, Any]:
    try:
        return _CONTENTS.get(kind, _keys)(payload, most)
    except (MessageError, ValueError) as error:
        return {"unreadable": str(error)}
