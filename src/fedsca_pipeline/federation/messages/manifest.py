"""What a message says of itself, and how its blob is opened; without torch, for whoever keeps a record of the wire."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import zstandard
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, deserialize

from fedsca_pipeline.errors import MessageError

WireDtype = Literal["fp32", "fp16", "int8"]
Compression = Literal["zstd", "none"]
MessageKind = Literal["aggregate", "update", "final", "report"]

METRICS = frozenset({"dice_validation", "dice_local", "loss", "steps", "seconds"})
"""The only metrics that a message may carry."""

MANIFEST = "manifest"
"""Where the manifest is in a blob's metadata."""


PrivacyLevel = Literal["patient-level", "image-level"]


@dataclass(frozen=True)
class Spent:
    """What a site says of its differential privacy: ``epsilon`` over all that it has ever answered, at ``delta``."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    level: PrivacyLevel
    epsilon: float
    delta: float
    noise_multiplier: float


@dataclass(frozen=True)
class Manifest:
    """What a message says of itself.

    An ``aggregate`` is answered by an ``update``; after the last round a ``final`` aggregate is answered by a
    ``report``, which holds metrics only. ``site`` is the sender of an answer and the receiver of an aggregate.
    ``relative``: the tensors are a difference from the base whose hash is ``base_hash``. ``answered`` is the last round
    of which the coordinator has used an update of this site, 0 for none: what the site trained after it has not
    happened. An answer repeats it. ``metrics`` are small numbers that travel along (loss, dice, seconds). ``privacy``:
    of a run with differential privacy; not written where None.
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
    privacy: Spent | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the manifest as JSON values; ``privacy`` only where there is some."""
        values = asdict(self) | {"metrics": {name: float(value) for name, value in self.metrics.items()}}
        return {key: value for key, value in values.items() if (key, value) != ("privacy", None)}


def outline(data: bytes, *, max_bytes: int = 2**30) -> dict[str, Any]:
    """Return what a message holds without its values: ``manifest``, and ``tensors``, name to dtype and shape.

    For whoever keeps a record of the wire, or must know which run a message is of before it can be checked.

    Raises:
        MessageError: as :func:`opened`.
    """
    manifest, flat = opened(data, max_bytes)
    tensors = {name: [view["dtype"], list(view["shape"])] for name, view in flat}
    return {"manifest": manifest.as_json(), "tensors": tensors}


def opened(data: bytes, max_bytes: int) -> tuple[Manifest, list[tuple[str, dict[str, Any]]]]:
    """Return a message's manifest and its entries as safetensors gives them: name, and dtype, shape and bytes.

    Raises:
        MessageError: it is malformed, or larger than ``max_bytes`` as a blob, before that much is allocated.
    """
    blob = _decompressed(data, max_bytes) if data.startswith(zstandard.FRAME_HEADER) else data
    if len(blob) > max_bytes:
        raise _too_large(len(blob), max_bytes)
    try:
        flat = deserialize(blob)
    except SafetensorError as error:
        raise MessageError(f"a message of {len(blob)} bytes is not safetensors: {error}") from error
    return _read_manifest(blob), flat


_MANIFEST_TYPE = TypeAdapter(Manifest)


def _decompressed(frame: bytes, max_bytes: int) -> bytes:
    """Undo zstd; a frame must say its size, so that a small one cannot unpack to any size it likes."""
    try:
        size = zstandard.frame_content_size(frame)
        if size < 0:
            raise MessageError(f"a message of {len(frame)} bytes does not say how large it is decompressed")
        if size > max_bytes:
            raise _too_large(size, max_bytes)
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MessageError(f"a message of {len(frame)} bytes cannot be decompressed: {error}") from error


def _too_large(size: int, max_bytes: int) -> MessageError:
    return MessageError(f"a message of {size} bytes is larger than the {max_bytes} allowed")


def _read_manifest(data: bytes) -> Manifest:
    # deserialize() has accepted the header by now, so its length and its JSON are sound.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    text = metadata.get(MANIFEST)
    if text is None:
        raise MessageError("a message carries no manifest in its safetensors metadata")
    if len(metadata) > 1:
        # Their names are the sender's, and may say what must not be repeated.
        raise MessageError(f"a message carries {len(metadata) - 1} entries beside its manifest in its metadata")
    try:
        return _MANIFEST_TYPE.validate_json(text)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors())
        raise MessageError(f"a message's manifest is malformed: {faults}") from error
