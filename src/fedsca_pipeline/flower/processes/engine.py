"""Find Flower's executables (the engine) and build the environment that they run in. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SITE_SOCKET = "FEDSCA_SITE_SOCKET"
"""Environment variable with the path of the socket at which the command of a site listens for the shim."""

_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONUNBUFFERED": "1",
}
# Variables of this process that Flower inherits; it gets no others.
_INHERITED = ("HOME", "LANG", "LC_ALL", "TMPDIR", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR")


def engine_folder(configured: Path | None) -> Path:
    """Return the folder of Flower's executables: the configured one, or by default the one of this Python.

    Raises:
        FileNotFoundError: the folder holds no ``flwr``.
    """
    folder = (configured or Path(sys.executable).parent).absolute()
    if not (folder / "flwr").is_file():
        raise FileNotFoundError(
            f"{folder}: this folder has no flwr; install requirements-flower.lock into a separate environment and set "
            "engine to its bin folder"
        )
    return folder


def environment(path: Path, home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables of a Flower process: ``path`` is its only PATH, ``home`` has Flower's files.

    Flower starts its subprocesses by name, so ``path`` limits what it can start.
    """
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {**inherited, **_SETTINGS, "PATH": str(path), "FLWR_HOME": str(home), **(more or {})}
