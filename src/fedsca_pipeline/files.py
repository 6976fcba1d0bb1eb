"""Files on disk: atomic writes, locks, JSON, safetensors, content hashes, secrets."""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from fedsca_pipeline.errors import WeightsError

if TYPE_CHECKING:
    import pandas as pd
    import torch

# Text that a spreadsheet takes for a formula, also behind apostrophes.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
# A second Ctrl-C takes effect at once if it comes more than this many seconds after the first.
_PATIENCE = 1.0
# Metadata of a sealed safetensors file.
_SEAL = "seal"
# The cure depends on the file: who reads it adds it.
_DAMAGED = "it is damaged"


@contextmanager
def atomic_path(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a path in a temporary folder beside ``path``; after the block its file, fsynced, replaces ``path``.

    On an error (a full disk, Ctrl-C) the temporary folder is removed and ``path`` stays as it was. It is a folder,
    since some writers (safetensors) put a temporary file beside their target. Missing parent folders are made. The
    file gets the permissions ``mode``; None: those of any new file under the user's umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    temporary = folder / path.name
    try:
        with name_the_file(path):
            yield temporary
            # safetensors ignores the umask and makes private files. Only a new file shows what the umask gives.
            ordinary = folder / ".ordinary"
            ordinary.touch()
            temporary.chmod(ordinary.stat().st_mode & 0o777 if mode is None else mode)
            sync_to_disk(temporary)
            temporary.replace(path)
            sync_to_disk(path.parent)
    finally:
        shutil.rmtree(folder)


class LockHeld(Exception):  # noqa: N818 - a state
    """Another process holds the lock. The message is what the holder wrote into the file."""


def open_locked(path: Path, seconds: float = 0.0) -> TextIO:
    """Return the file at ``path``, created if missing and locked until it is closed.

    A process that inherits the open file (``pass_fds``) also holds the lock, until it ends.

    Raises:
        LockHeld: another process still holds the lock after ``seconds``.
        OSError: the file cannot be opened or locked.
    """
    from filelock import lock_descriptor

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    until = time.monotonic() + seconds
    # Not "w": what the holder wrote stays.
    file = path.open("a+")
    try:
        with name_the_file(path):
            while not lock_descriptor(file.fileno(), blocking=False):
                if time.monotonic() >= until:
                    raise LockHeld(path.read_text(errors="replace"))
                time.sleep(0.1)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def name_the_file(path: Path) -> Iterator[None]:
    """Add ``path`` to an OSError of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_partial_files(folder: Path, name: str = "*", *, but: str = "") -> None:
    """Remove the partial files that killed commands left below ``folder``, of all files or of those called ``name``.

    ``but``: name of a folder that stays as it is. No other process may be writing the removed files.
    """
    for path in folder.rglob(f".{name}.partial"):
        if but not in path.parts:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def move(source: Path, target: Path) -> None:
    """Rename a file to ``target``, on the same disk, and return once the rename is on the disk."""
    source.replace(target)
    sync_to_disk(target.parent)


def sync_to_disk(path: Path) -> None:
    """Wait until the file, or the folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write ``data`` to ``path`` atomically, with the permissions of ``atomic_path``."""
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, atomically.

    Raises:
        ValueError: it contains NaN or infinity.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def as_cell(text: str) -> str:
    """Return text for a cell of a table that people open in a spreadsheet, which would run a formula.

    Text that starts with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return gets an apostrophe before it, and so
    does such text behind apostrophes, so that ``from_cell`` gives back what was.

    >>> as_cell("=1+1"), as_cell("'-x"), as_cell("p01")
    ("'=1+1", "''-x", 'p01')
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """Return the text that ``as_cell`` was given.

    >>> from_cell("'=1+1"), from_cell("''-x"), from_cell("'p01")
    ('=1+1', "'-x", "'p01")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def as_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with ``as_cell`` of its texts and column names; numbers and missing values stay."""
    return _each_text(table, as_cell)


def from_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table that ``as_cells`` was given."""
    return _each_text(table, from_cell)


def _each_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    texts = table.select_dtypes(["object", "string"])
    changed = {name: texts[name].map(lambda cell: change(cell) if isinstance(cell, str) else cell) for name in texts}
    columns = {name: change(name) for name in table if isinstance(name, str)}
    return table.assign(**changed).astype(texts.dtypes).rename(columns=columns)


def read_or_create_secret(path: Path) -> bytes:
    """Return the secret stored at ``path``, 64 hex digits; draw and store one, readable by its owner only, if missing.

    Raises:
        ValueError: the file's content is not such a secret.
    """
    if not path.exists():
        write_bytes(path, secrets.token_hex(32).encode(), mode=0o600)
    secret = path.read_bytes().strip()
    if not re.fullmatch(rb"[0-9a-f]{64}", secret):
        raise ValueError(f"{path}: not the secret that was written there; restore it from a copy, or delete the file")
    return secret


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        ValueError: the file is not JSON.
    """
    return json.loads(path.read_bytes())


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with ``sha256``, the hash of all its other values; the order of keys does not matter.

    >>> unsealed(sealed({"a": 1, "b": 2}))
    {'a': 1, 'b': 2}
    """
    return {**value, "sha256": hashlib.sha256(_canonical(value)).hexdigest()}


def unsealed(value: Any) -> dict[str, Any]:
    """Return the JSON object that ``sealed`` got.

    Raises:
        ValueError: it is not an object, or not as it was written.
    """
    if not isinstance(value, dict) or "sha256" not in value:
        raise ValueError("not an object with a checksum")
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    if sealed(rest) != value:
        raise ValueError("its checksum differs: it was damaged or edited")
    return rest


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors to ``path`` as safetensors, atomically, without a copy in memory.

    An empty mapping gives a valid file without tensors.
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
    """Return every tensor of a safetensors file, memory-mapped: pages are read on access and copied on write.

    Raises:
        WeightsError: the file is missing or damaged; the message ends with ``cure``, or with a general one if "".
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # torch turns an interrupt during the load into a ValueError about a tensor's shape.
        with interrupts_deferred():
            return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error, cure) from error


def write_sealed(path: Path, tensors: Mapping[str, torch.Tensor], label: Mapping[str, Any]) -> None:
    """Write named tensors with a label, a JSON object, and a checksum over both, atomically."""
    # One entry: safetensors writes several in any order, and equal files must have equal bytes.
    write_tensors(path, tensors, {_SEAL: json.dumps({"label": dict(label), "sha256": _sha256_of(label, tensors)})})


def read_sealed(path: Path, **expected: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return label and tensors that ``write_sealed`` wrote, after checking them; the tensors are memory-mapped.

    Raises:
        WeightsError: the file is missing or damaged, or an entry of its label is not as ``expected``.
    """
    label = read_label(path)
    if others := [name for name, value in expected.items() if label.get(name) != value]:
        raise WeightsError(
            f"{path}: belongs to {others[0]} {label.get(others[0])!r:.80} in place of {expected[others[0]]!r}"
        )
    tensors = read_tensors(path, cure=_DAMAGED)
    if _sha256_of(label, tensors) != _seal(path).get("sha256"):
        raise WeightsError(f"{path}: its checksum differs; {_DAMAGED}")
    return label, tensors


def read_label(path: Path) -> dict[str, Any]:
    """Return the label of a sealed file; its checksum, which costs reading the whole file, is not checked.

    Raises:
        WeightsError: the file is missing or damaged, or has no label.
    """
    label = _seal(path).get("label")
    if not isinstance(label, dict):
        raise WeightsError(f"{path}: has no label; {_DAMAGED}")
    return label


def set_aside(path: Path) -> Path:
    """Rename a damaged file to a name that nothing reads, and return that; an earlier one stays."""
    aside = path.with_name(f"{path.name}.damaged")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}~")
    path.rename(aside)
    return aside


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_path(path: Path) -> str:
    """Return ``sha256_file`` of a file; for a folder, a hash of its visible files' hashes, whatever their names."""
    # Trying to open it is faster than checking first.
    with suppress(IsADirectoryError):
        return sha256_file(path)
    digests = sorted(sha256_file(file) for file in path.iterdir() if not file.name.startswith("."))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that identify a JSON-serialisable value; the order of keys does not matter.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(_canonical(value)).hexdigest()[:16]


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block; one that comes over a second after the first takes effect at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts: list[float] = []
    before = signal.getsignal(signal.SIGINT)

    def later(number: int, frame: FrameType | None) -> None:
        interrupts.append(time.monotonic())
        if interrupts[-1] - interrupts[0] > _PATIENCE:
            signal.signal(signal.SIGINT, before)
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupts:
            signal.raise_signal(signal.SIGINT)


def _seal(path: Path) -> dict[str, Any]:
    """Return label and checksum of a sealed file.

    Raises:
        WeightsError: the file is missing or damaged, or has none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            seal = json.loads((file.metadata() or {})[_SEAL])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise _unreadable(path, error, _DAMAGED) from error
    return seal if isinstance(seal, dict) else {}


def _sha256_of(label: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.sha256(_canonical(label))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _unreadable(path: Path, error: Exception, cure: str = "") -> WeightsError:
    cure = cure or "run again with --params=force=true to write it again"
    return WeightsError(f"{path}: cannot be read as safetensors ({error!r}); {cure}")


def _system_error(error: Exception) -> OSError | None:
    """Return the operating system's error, such as a full disk, whose number a safetensors error mentions."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
