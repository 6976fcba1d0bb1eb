"""Provenance of a foundation's weights: their name, source, licence and hash."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedsca_pipeline.files import read_json, write_json


@dataclass(frozen=True)
class Provenance:
    """Origin of the weights of one foundation.

    Args:
        name: as in the configuration: ``mobile_sam``, ``sam`` or ``random``.
        source: package, hub id or folder, with enough detail to fetch the same bytes again.
        licence: licence of the weights, as far as known.
        note: what a reader of a model card must know.
        sha256: SHA-256 of the weights file; for ``random``, of its specification.
        file: the weights file, relative to the foundation folder (``sam``: to its source; ``random``: "").
    """

    name: str
    source: str
    licence: str
    note: str
    sha256: str
    file: str


def write_provenance(path: Path, provenance: Provenance) -> None:
    """Write ``provenance`` to ``path`` as JSON, atomically."""
    write_json(path, asdict(provenance))


def read_provenance(path: Path) -> Provenance | None:
    """Return the content of a provenance file; None if it is missing or not a provenance."""
    # A pipe would be waited for.
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except ValueError:
        return None
    if not isinstance(value, dict) or set(value) != {field.name for field in fields(Provenance)}:
        return None
    return Provenance(**value)
