"""What crosses the wire: one safetensors blob, its manifest, and the names and places of the tensors in it.

docs/method.md. The manifest is JSON in the safetensors header's metadata; tensor names and shapes are the header's
own (``envelope``). The blob travels as it is or as one zstd frame. Nothing here is pickled, and nothing that arrives is
trusted: :func:`decode` checks the form, :func:`check` the content.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

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
"""``federation.wire_dtype`` to the dtypes that its messages may have: a site without a base gets no difference."""

_SCALE = "::scale"  # no module path holds a colon, so a scale never hides a tensor
_FP16_MAX = 65504.0
_MOST_SAMPLES = 2**31 - 1
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8}
# The library's own default: on real updates no level from 1 to 19 saves 3 % more, and high ones take 50 times as long.
_ZSTD_LEVEL = 3
# In a header: the manifest, and one tensor's entry with that of its scale.
_MANIFEST_BYTES, _ENTRY_BYTES = 65_536, 1_024


@dataclass(frozen=True)
class Message:
    """A decoded message; its tensors are fp32 on the CPU, whatever the wire dtype."""

    manifest: Manifest
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Codec:
    """A wire dtype: from one named tensor to the blob's entries, and from all entries back to fp32 tensors."""

    pack: Callable[[str, Tensor], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def encode(manifest: Manifest, tensors: Mapping[str, Tensor], compression: Compression = "none") -> bytes:
    """Return ``tensors`` (any shapes and float dtypes; none at all is fine) and ``manifest`` as one safetensors blob.

    With ``zstd`` the blob comes as one frame that says its size. The bytes depend on nothing but the arguments (and
    zstd's version). ``int8`` is symmetric with one scale max|x|/127 per tensor, carried as an fp32 entry (0 for a
    tensor of zeros). Raises MessageError, naming the tensor, where a value does not fit the manifest's dtype: beyond
    65504 in fp16, NaN or infinity in int8.
    """
    entries = {name: entry.numpy() for name, entry in _pack(tensors, manifest.dtype).items()}
    blob = save(entries, metadata={MANIFEST: json.dumps(manifest.as_json(), sort_keys=True)})
    return _COMPRESS[compression](blob)


def decode(data: bytes, *, max_bytes: int = 2**30) -> Message:
    """Return the message in ``data``, compressed or not.

    Raises MessageError on anything malformed, and on what is larger than ``max_bytes`` as a blob (1 GiB unless told),
    before that much is allocated.
    """
    manifest, flat = opened(data, max_bytes)
    entries = {name: _read_entry(name, view) for name, view in flat}
    return Message(manifest, _CODECS[manifest.dtype].unpack(entries))


def most_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return a bound on the bytes of any honest message with tensors of ``shapes``, decompressed."""
    values = sum(math.prod(shape) for shape in shapes.values())
    return _MANIFEST_BYTES + _ENTRY_BYTES * len(shapes) + 4 * values


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
    """Raise a MessageError that names all that differs from what was expected.

    ``base_hash`` None accepts any base, ``answered`` None any earlier round. An update's sample count is ``samples``,
    or where that is not known from 1 to below 2**31. Metrics are those of ``METRICS`` alone, and finite.
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
        faults.append(f"unexpected metrics: {_some(unknown)}")
    if infinite := sorted(name for name, value in manifest.metrics.items() if not math.isfinite(value)):
        faults.append(f"metrics that are not finite: {_some(infinite)}")
    if manifest.kind == "update":
        faults += _count_faults(manifest.samples, samples)
    if missing := sorted(shapes.keys() - message.tensors.keys()):
        faults.append(f"missing tensors: {_some(missing)}")
    if unexpected := sorted(message.tensors.keys() - shapes.keys()):
        faults.append(f"unexpected tensors: {_some(unexpected)}")
    faults += [
        f"shape of {name} is {tuple(message.tensors[name].shape)}, expected {tuple(shapes[name])}"
        for name in sorted(shapes.keys() & message.tensors.keys())
        if tuple(message.tensors[name].shape) != tuple(shapes[name])
    ]
    if faults:
        raise MessageError(f"site {site}, round {round}, {kind}: {'; '.join(faults)}")


def _count_faults(count: int, known: int | None) -> list[str]:
    # A count is its sender's weight in everybody's mix. A huge one has more digits than Python prints.
    if count < 1:
        return ["sample count is below 1"]
    if count > _MOST_SAMPLES:
        return [f"sample count is above {_MOST_SAMPLES}"]
    return [] if known in (None, count) else [f"sample count is {count}, expected {known}"]


def as_decoded(tensors: Mapping[str, Tensor], dtype: WireDtype) -> dict[str, Tensor]:
    """Return what the other end holds after :func:`encode` and :func:`decode`, bit for bit; raises like ``encode``."""
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
    # Below the smallest normal number the scale itself is too coarse to divide by.
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
        raise MessageError(f"scales without a tensor: {_some(orphans)}")
    return {name: _dequantise(name, entry, entries.get(name + _SCALE)) for name, entry in values.items()}


def _dequantise(name: str, values: Tensor, scale: Tensor | None) -> Tensor:
    _expect(name, values, torch.int8)
    if scale is None:
        raise MessageError(f"{name}: its int8 scale is missing")
    _expect(name + _SCALE, scale, torch.float32)
    if scale.shape != () or not 0 <= scale.item() < math.inf:
        raise MessageError(f"{name}: its int8 scale is not one finite number from 0 on")
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


def _read_entry(name: str, view: Mapping) -> Tensor:
    dtype = _DTYPES.get(view["dtype"])
    if dtype is None:
        raise MessageError(f"{name}: dtype {view['dtype']} never travels; only {', '.join(_DTYPES)} do")
    if not view["data"]:
        return torch.empty(view["shape"], dtype=dtype)
    return torch.frombuffer(view["data"], dtype=dtype).reshape(view["shape"])


def _expect(name: str, entry: Tensor, dtype: torch.dtype) -> None:
    if entry.dtype != dtype:
        raise MessageError(f"{name}: dtype is {entry.dtype}, the manifest's wire dtype means {dtype}")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
