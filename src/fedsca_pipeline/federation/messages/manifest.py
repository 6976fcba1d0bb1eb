"""The manifest of a message, and how a blob is opened. Imports no torch: audit logs read messages with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import zstandard
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, deserialize

from fedsca_pipeline.errors import MessageError, counted

WireDtype = Literal["fp32", "fp16", "int8"]
Compression = Literal["zstd", "none"]
MessageKind = Literal["aggregate", "update", "final", "report"]

METRICS = frozenset({"dice_validation", "dice_local", "loss", "steps", "seconds"})
"""The only metrics that a message may hold."""

MANIFEST = "manifest"
"""Key of the manifest in a blob's metadata."""

PrivacyLevel = Literal["patient-level", "image-level"]


@dataclass(frozen=True)
class PrivacySpent:
    """A site's differential privacy so far: ``epsilon`` at ``delta``, over all its answers in all runs."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    level: PrivacyLevel
    epsilon: float
    delta: float
    noise_multiplier: float


@dataclass(frozen=True)
class Manifest:
    """The description of a message.

    A site answers an ``aggregate`` with an ``update``; after the last round it answers a ``final`` aggregate with a
    ``report``, which holds metrics only. ``site`` receives an aggregate and sends an answer. If ``relative``, the
    tensors are a difference from the base whose hash is ``base_hash``. ``answered`` is the last round whose update of
    this site the coordinator has used, 0 for none: the site discards what it trained after that round. An answer
    repeats it. ``metrics`` are small numbers (``METRICS``). ``privacy`` belongs to a run with differential privacy;
    None is not written.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: MessageKind
    run: str
    round: int
    site: str
    base_hash: str
    samples: int
    dtype: WireDtype
    relative: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    answered: int = 0
    privacy: PrivacySpent | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values, without ``privacy`` if it is None."""
        values = asdict(self) | {"metrics": {name: float(value) for name, value in self.metrics.items()}}
        return {key: value for key, value in values.items() if (key, value) != ("privacy", None)}


def outline(data: bytes, *, max_bytes: int = 2**30) -> dict[str, Any]:
    """Return a message's content without its values: ``manifest``, and ``tensors``, name to dtype and shape.

    Audit logs record it, and a site reads from it which run a message belongs to before checking the message.

    Raises:
        MessageError: as :func:`opened`.
    """
    manifest, flat = opened(data, max_bytes)
    tensors = {name: [view["dtype"], list(view["shape"])] for name, view in flat}
    return {"manifest": manifest.as_json(), "tensors": tensors}


def opened(data: bytes, max_bytes: int) -> tuple[Manifest, list[tuple[str, dict[str, Any]]]]:
    """Return a message's manifest and its safetensors entries: name, and a dict of dtype, shape and bytes.

    Raises:
        MessageError: the message is malformed, or its blob is larger than ``max_bytes``; checked before the memory is
            allocated.
    """
    blob = _decompressed(data, max_bytes) if data.startswith(zstandard.FRAME_HEADER) else data
    if len(blob) > max_bytes:
        raise _too_large(len(blob), max_bytes)
    try:
        flat: list[tuple[str, dict[str, Any]]] = deserialize(blob)
    except SafetensorError as error:
        raise MessageError(f"a message of {len(blob)} bytes is not safetensors: {error}") from error
    return _read_manifest(blob), flat


_MANIFEST_TYPE = TypeAdapter(Manifest)


def _decompressed(frame: bytes, max_bytes: int) -> bytes:
    """Return a zstd frame's content. The frame must state its size, so that a small one cannot fill the memory."""
    try:
        size = zstandard.frame_content_size(frame)
        if size < 0:
            raise MessageError(f"a message of {len(frame)} bytes does not state its decompressed size")
        if size > max_bytes:
            raise _too_large(size, max_bytes)
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MessageError(f"a message of {len(frame)} bytes cannot be decompressed: {error}") from error


def _too_large(size: int, max_bytes: int) -> MessageError:
    return MessageError(f"a message of {size} bytes is larger than the {max_bytes} allowed")


def _read_manifest(data: bytes) -> Manifest:
    # deserialize() has accepted the header, so its length and its JSON are valid.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    text = metadata.get(MANIFEST)
    if text is None:
        raise MessageError("a message has no manifest in its safetensors metadata")
    if len(metadata) > 1:
        # The sender chooses the keys, which can hold text that must not be repeated in a log.
        raise MessageError(f"a message's metadata has {counted(len(metadata) - 1, 'key')} beside its manifest")
    try:
        return _MANIFEST_TYPE.validate_json(text)
    except ValidationError as error:
        # Without the values given, which the sender chooses (so no faults_by_key).
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors())
        raise MessageError(f"a message's manifest is malformed: {faults}") from error
