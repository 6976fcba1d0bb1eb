"""Atomic writes, content hashes and safetensors files: the only ways this project touches disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.errors import WeightsError

if TYPE_CHECKING:
    import torch

# Seconds after which a second Ctrl-C is not one of impatience.
_PATIENCE = 1.0


@contextmanager
def atomic_path(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a path in a temporary folder beside ``path``; its file replaces ``path``, fsynced, if the block ends well.

    On an error (a full disk, Ctrl-C) the temporary folder is removed and ``path`` is as it was. A folder, since some
    writers (safetensors) put a temporary file of their own beside their target. Missing parent folders are made. The
    file has the permissions ``mode``, or those that the user's umask gives any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    temporary = folder / path.name
    try:
        with name_the_file(path):
            yield temporary
            # safetensors makes files private to the user, whatever the umask is; it can be seen of a new file only.
            ordinary = folder / ".ordinary"
            ordinary.touch()
            temporary.chmod(ordinary.stat().st_mode & 0o777 if mode is None else mode)
            sync_to_disk(temporary)
            temporary.replace(path)
            sync_to_disk(path.parent)
    finally:
        shutil.rmtree(folder)


@contextmanager
def name_the_file(path: Path) -> Iterator[None]:
    """Put ``path`` into the OSError of a write that fails in the block: a full disk does not say of which file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_partial_files(folder: Path, name: str = "*") -> None:
    """Remove what killed commands left half-written below ``folder``, of all files or of those called ``name``.

    Nobody else may be writing these.
    """
    for path in folder.rglob(f".{name}.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def move(source: Path, target: Path) -> None:
    """Rename a file over ``target``, on the same disk, and make that last."""
    source.replace(target)
    sync_to_disk(target.parent)


def sync_to_disk(path: Path) -> None:
    """Return once the file, or the folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write ``data`` to ``path`` atomically, with permissions as of ``atomic_path``."""
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically. NaN and infinity raise ValueError."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_or_create_secret(path: Path) -> bytes:
    """Return the secret kept at ``path``, 64 hex digits; it is drawn, for its owner's eyes alone, where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        write_bytes(path, secrets.token_hex(32).encode(), mode=0o600)
    secret = path.read_bytes().strip()
    if not re.fullmatch(rb"[0-9a-f]{64}", secret):
        raise ValueError(f"{path}: not the secret that was written there; restore it from a copy, or delete it")
    return secret


def read_json(path: Path) -> Any:
    """Read JSON from ``path``."""
    return json.loads(path.read_bytes())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors to ``path`` as safetensors, atomically, without a copy of them in memory.

    An empty mapping gives a valid, empty file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:
            if (system := _system_error(error)) is None:
                raise
            raise system from error


def read_tensors(path: Path, cure: str = "") -> dict[str, torch.Tensor]:
    """Return every tensor of a safetensors file, memory-mapped: read when touched, and copied where written to.

    Raises:
        WeightsError: the file is missing or damaged; says what to do, which is ``cure`` if that is given.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # An interrupt in the middle comes out of torch as a ValueError about a tensor's shape.
        with interrupts_deferred():
            return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error, cure) from error


def read_header(path: Path, key: str) -> Any:
    """Read the JSON that a safetensors file carries in its metadata under ``key``.

    Raises:
        WeightsError: the file is missing or damaged, or carries no such entry.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {})[key])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_path(path: Path) -> str:
    """Return ``sha256_file`` of a file; of a folder, one over those of its visible files, whatever they are called."""
    # To open it and see takes less than to ask before.
    with suppress(IsADirectoryError):
        return sha256_file(path)
    digests = sorted(sha256_file(file) for file in path.iterdir() if not file.name.startswith("."))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that identify a JSON-serialisable value whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C have its effect after the block, not in it; one that comes a second after the first does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[float] = []
    before = signal.getsignal(signal.SIGINT)

    def later(number: int, frame: FrameType | None) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > _PATIENCE:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _unreadable(path: Path, error: Exception, cure: str = "") -> WeightsError:
    cure = cure or "run again with --params=force=true to make it anew"
    return WeightsError(f"{path}: cannot be read as safetensors ({error!r}); {cure}")


def _system_error(error: Exception) -> OSError | None:
    """Return the operating system's error (a full disk) that safetensors only tells the number of."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
