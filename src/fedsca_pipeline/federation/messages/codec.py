"""Messages between server and sites: tensors and a manifest to bytes and back (docs/method.md).

A message is one safetensors blob, sent as it is or as one zstd frame. Its manifest is JSON in the header's metadata
(``manifest.py``). Messages are never pickled, and received ones are untrusted: :func:`decode` checks the form,
:func:`check` the content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import torch
import zstandard
from safetensors.numpy import save
from torch import Tensor

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.messages.manifest import (
    MANIFEST,
    METRICS,
    Compression,
    Manifest,
    MessageKind,
    WireDtype,
    opened,
)
from fedsca_pipeline.model.layout import fp32_on_cpu

TRAVELLING: Mapping[WireDtype, tuple[WireDtype, ...]] = MappingProxyType(
    {"fp32": ("fp32",), "fp16": ("fp16",), "int8": ("int8", "fp16")}
)
"""``federation.wire_dtype`` to the dtypes its messages may have: with int8, a site without a base receives fp16."""

_SCALE = "::scale"  # no module path holds a colon, so a scale never hides a tensor
_FP16_MAX = 65504.0
_MOST_SAMPLES = 2**31 - 1
_VALUE_BYTES: Mapping[WireDtype, int] = {"fp32": 4, "fp16": 2, "int8": 1}
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}
# zstd's default. On real updates no level from 1 to 19 saves 3 % more, and the high levels take 50 times as long.
_ZSTD_LEVEL = 3
# Header bytes of the manifest, and of one tensor with its scale.
_MANIFEST_BYTES, _ENTRY_BYTES = 65_536, 1_024


@dataclass(frozen=True)
class Message:
    """A decoded message; its tensors are fp32 on the CPU, whatever the wire dtype."""

    manifest: Manifest
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Codec:
    """One wire dtype: ``pack`` makes blob entries of a named tensor, ``unpack`` makes fp32 tensors of all entries."""

    pack: Callable[[str, Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def encode(manifest: Manifest, tensors: Mapping[str, Tensor], compression: Compression = "none") -> bytes:
    """Return ``tensors`` and ``manifest`` as one safetensors blob; with ``zstd`` as one frame that states its size.

    Tensors have any shape and float dtype; an empty mapping is a valid message. The bytes depend only on the arguments
    and on zstd's version. ``int8`` is symmetric, with one scale ``max|x| / 127`` per tensor, stored as an fp32 entry (0
    for a tensor of zeros).

    >>> import torch
    >>> manifest = Manifest("update", "run", 1, "north", "0" * 16, samples=20, dtype="fp16", relative=False)
    >>> data = encode(manifest, {"block.0.up": torch.tensor([0.5, -2.0])}, "zstd")
    >>> decode(data).tensors["block.0.up"].tolist()
    [0.5, -2.0]

    Raises:
        MessageError: a value does not fit the manifest's dtype (beyond 65504 in fp16, NaN or infinity in int8); names
            the tensor.
    """
    entries = {name: entry.numpy() for name, entry in _pack(tensors, manifest.dtype).items()}
    blob = save(entries, metadata={MANIFEST: json.dumps(manifest.as_json(), sort_keys=True)})
    return _COMPRESS[compression](blob)


def decode(data: bytes, *, max_bytes: int = 2**30) -> Message:
    """Return the message in ``data``, compressed or not; its tensors are fp32 on the CPU.

    >>> manifest = Manifest("report", "run", 9, "north", "0" * 16, samples=20, dtype="fp32", relative=False)
    >>> message = decode(encode(manifest, {}))
    >>> message.manifest == manifest, message.tensors
    (True, {})

    Raises:
        MessageError: the message is malformed, or its blob is larger than ``max_bytes``; checked before the memory is
            allocated.
    """
    manifest, flat = opened(data, max_bytes)
    entries = {name: _read_entry(name, view) for name, view in flat}
    return Message(manifest, _CODECS[manifest.dtype].unpack(entries))


def most_bytes(shapes: Mapping[str, tuple[int, ...]], wire_dtype: WireDtype = "fp32") -> int:
    """Return an upper bound on the decompressed bytes of a valid message with tensors of ``shapes``.

    ``wire_dtype`` is that of the run; the default bounds messages of every dtype.
    """
    values = sum(math.prod(shape) for shape in shapes.values())
    widest = max(_VALUE_BYTES[dtype] for dtype in TRAVELLING[wire_dtype])
    return _MANIFEST_BYTES + _ENTRY_BYTES * len(shapes) + widest * values


def check(
    message: Message,
    *,
    kind: MessageKind,
    run: str,
    round: int,  # noqa: A002 - the manifest's word
    site: str,
    base_hash: str | None,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Collection[WireDtype] = get_args(WireDtype),
    answered: int | None = None,
    samples: int | None = None,
) -> None:
    """Check that a message is the expected one.

    ``base_hash`` None accepts any base, ``answered`` None any earlier round. An update's sample count must be
    ``samples``, or between 1 and 2**31 - 1 if ``samples`` is None. Metrics must be in ``METRICS``, and finite.

    Raises:
        MessageError: lists every difference.
    """
    manifest = message.manifest
    expected = {"kind": kind, "run": run, "round": round, "site": site}
    expected |= {name: value for name, value in (("base_hash", base_hash), ("answered", answered)) if value is not None}
    faults = [
        f"{name.replace('_', ' ')} is {getattr(manifest, name)!r}, expected {value!r}"
        for name, value in expected.items()
        if getattr(manifest, name) != value
    ]
    if not 0 <= manifest.answered < max(1, round):
        faults.append("answered is no earlier round")
    if manifest.dtype not in dtypes:
        faults.append(f"wire dtype is {manifest.dtype}, expected {' or '.join(dtypes)}")
    if unknown := sorted(manifest.metrics.keys() - METRICS):
        faults.append(f"unexpected metrics: {_first(unknown)}")
    if infinite := sorted(name for name, value in manifest.metrics.items() if not math.isfinite(value)):
        faults.append(f"metrics that are not finite: {_first(infinite)}")
    if manifest.kind == "update":
        faults += _count_faults(manifest.samples, samples)
    if missing := sorted(shapes.keys() - message.tensors.keys()):
        faults.append(f"missing tensors: {_first(missing)}")
    if unexpected := sorted(message.tensors.keys() - shapes.keys()):
        faults.append(f"unexpected tensors: {_first(unexpected)}")
    faults += [
        f"shape of {name} is {tuple(message.tensors[name].shape)}, expected {tuple(shapes[name])}"
        for name in sorted(shapes.keys() & message.tensors.keys())
        if tuple(message.tensors[name].shape) != tuple(shapes[name])
    ]
    if faults:
        raise MessageError(f"site {site}, round {round}, {kind}: {'; '.join(faults)}")


def _count_faults(count: int, known: int | None) -> list[str]:
    # The count is the sender's weight in every site's aggregate. Python refuses to print very large integers.
    if count < 1:
        return ["sample count is below 1"]
    if count > _MOST_SAMPLES:
        return [f"sample count is above {_MOST_SAMPLES}"]
    if known in (None, count):
        return []
    return [
        f"it claims {count} training images, and {known} before. A site's images stay the same during a run: restore "
        "them there, or start the run anew with --params=force=true"
    ]


def as_decoded(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    """Return the tensors that the receiver decodes, bit for bit, without a message; raises like :func:`encode`."""
    return _CODECS[dtype].unpack(_pack(tensors, dtype))


def _pack(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    pack = _CODECS[dtype].pack
    return {key: entry for name, tensor in tensors.items() for key, entry in pack(name, tensor).items()}


def _pack_fp32(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: fp32_on_cpu(tensor)}


def _pack_fp16(name: str, tensor: Tensor) -> dict[str, Tensor]:
    values = fp32_on_cpu(tensor)
    if (largest := _largest(values)) > _FP16_MAX:
        raise MessageError(f"{name}: |x| reaches {largest:g}, beyond fp16's {_FP16_MAX:g}; use wire_dtype: fp32")
    return {name: values.half()}


def _pack_int8(name: str, tensor: Tensor) -> dict[str, Tensor]:
    values = fp32_on_cpu(tensor)
    largest = _largest(values)
    if not math.isfinite(largest):
        raise MessageError(f"{name}: NaN or infinity does not fit int8")
    scale = torch.tensor(largest) / 127
    # A subnormal scale is too coarse to divide by.
    if scale < torch.finfo(torch.float32).tiny:
        scale = torch.zeros(())
        return {name: torch.zeros_like(values, dtype=torch.int8), name + _SCALE: scale}
    return {name: (values / scale).round().clamp(-127, 127).to(torch.int8), name + _SCALE: scale}


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _unpack_float(dtype: torch.dtype) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    def unpack(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, entry in entries.items():
            _expect(name, entry, dtype)
        return {name: entry.float() for name, entry in entries.items()}

    return unpack


def _unpack_int8(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {name: entry for name, entry in entries.items() if not name.endswith(_SCALE)}
    if orphans := sorted(entries.keys() - values.keys() - {name + _SCALE for name in values}):
        raise MessageError(f"scales without a tensor: {_first(orphans)}")
    return {name: _dequantise(name, entry, entries.get(name + _SCALE)) for name, entry in values.items()}


def _dequantise(name: str, values: Tensor, scale: Tensor | None) -> Tensor:
    _expect(name, values, torch.int8)
    if scale is None:
        raise MessageError(f"{name}: its int8 scale is missing")
    _expect(name + _SCALE, scale, torch.float32)
    if scale.shape != () or not 0 <= scale.item() < math.inf:
        raise MessageError(f"{name}: its int8 scale is not one finite number of 0 or more")
    return values.float() * scale


_CODECS: Mapping[WireDtype, _Codec] = {
    "fp32": _Codec(_pack_fp32, _unpack_float(torch.float32)),
    "fp16": _Codec(_pack_fp16, _unpack_float(torch.float16)),
    "int8": _Codec(_pack_int8, _unpack_int8),
}

_COMPRESS: Mapping[Compression, Callable[[bytes], bytes]] = {
    "zstd": lambda blob: zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(blob),
    "none": lambda blob: blob,
}


def _read_entry(name: str, view: Mapping[str, Any]) -> Tensor:
    dtype = _DTYPES.get(view["dtype"])
    if dtype is None:
        raise MessageError(f"{name}: dtype {view['dtype']} is not allowed in a message, only {', '.join(_DTYPES)}")
    if not view["data"]:
        return torch.empty(view["shape"], dtype=dtype)
    return torch.frombuffer(view["data"], dtype=dtype).reshape(view["shape"])


def _expect(name: str, entry: Tensor, dtype: torch.dtype) -> None:
    if entry.dtype != dtype:
        raise MessageError(f"{name}: dtype is {entry.dtype}, the manifest's wire dtype needs {dtype}")


def _first(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
