"""Flower's executables: where they are and the environment they run in. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SITE_SOCKET = "FEDSCA_SITE_SOCKET"
"""Environment variable: where a site's command listens for its shim."""

_SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONUNBUFFERED": "1",
}
# What a process needs of its surroundings; nothing else of this one's environment is handed to Flower.
_KEPT = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")


def engine_folder(configured: Path | None) -> Path:
    """Return the folder of Flower's executables: the configured one, or that of this Python.

    Raises:
        FileNotFoundError: it holds no ``flwr``.
    """
    folder = (configured or Path(sys.executable).parent).absolute()
    if not (folder / "flwr").is_file():
        raise FileNotFoundError(
            f"{folder}: no flwr there; install requirements-flower.lock into an environment of its own and name its "
            "bin folder as engine"
        )
    return folder


def environment(path: Path, home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a Flower process: executables looked up in ``path`` alone, Flower's files in ``home``.

    Flower starts its helpers by name, so ``path`` decides what can be started at all.
    """
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return {**kept, **_SILENT, "PATH": str(path), "FLWR_HOME": str(home), **(more or {})}
