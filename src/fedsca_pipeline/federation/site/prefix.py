"""The frozen encoder prefix: the model before its first trained tensor, whose features of an image can be cached."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from fedsca_pipeline.compute import autocast
from fedsca_pipeline.model.foundation.model import SegmentationModel

Key = tuple[int, int]

logger = logging.getLogger(__name__)

_FEATURE_BYTES = 2  # fp16
# Operations that a device does in the time in which a byte of features is read from its file, made fp32 and brought to
# the device, about a nanosecond. Estimates: a CPU does 10 to 100, a GPU more than ten thousand (docs/performance.md).
_CPU_OPERATIONS_PER_BYTE = 100
_OPERATIONS_PER_BYTE = 10_000
_FILLED = b"\1"  # last byte of a slot, so that a partial write leaves it empty


class SplitModel:
    """A model cut before its first trained tensor: ``logits(features(images, valid))`` is the model's own forward.

    If the stem itself is trained, there is no frozen prefix (``has_prefix``), and features are the normalised pixels.

    Args:
        model: foundation with adapters attached.
        trainable: names of the tensors that change.
    """

    def __init__(self, model: SegmentationModel, trainable: Container[str]) -> None:
        self.model = model
        changing = {id(parameter) for name, parameter in model.named_parameters() if name in trainable}
        trunk = model.backbone.trunk()
        frozen = [not any(id(parameter) in changing for parameter in module.parameters()) for module in trunk]
        behind_stem = {id(parameter) for module in (*trunk, model.decoder) for parameter in module.parameters()}
        self.has_prefix = changing <= behind_stem
        cut = (*frozen, False).index(False) if self.has_prefix else 0
        self._before, self._after = trunk[:cut], trunk[cut:]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        return self._probed[0]

    @property
    def operations(self) -> int:
        """Multiplications and additions in the linear and convolutional layers that compute one image's features."""
        return self._probed[1]

    @property
    def worth_caching(self) -> bool:
        """Whether to read an image's features back is cheaper than to compute them again; never without a prefix."""
        kept = _FEATURE_BYTES * math.prod(self.feature_shape)
        return self.has_prefix and cheaper_to_read(kept, self.operations, next(self.model.parameters()).device)

    @cached_property
    def _probed(self) -> tuple[tuple[int, ...], int]:
        device, side = next(self.model.parameters()).device, self.model.image_size
        blank = torch.zeros(1, 3, side, side, device=device)
        counts: list[int] = []

        def count(layer: nn.Module, _: object, output: Tensor) -> None:
            weight: Tensor = layer.weight  # type: ignore[assignment]  # both kinds of layer have one
            counts.append(2 * weight.numel() * (output.numel() // len(weight)))

        layers = [module for module in self.model.encoder.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        hooks = [layer.register_forward_hook(count) for layer in layers]
        try:
            return tuple(self.features(blank, blank[:, 0] > 0).shape[1:]), sum(counts)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def features(self, images: Tensor, valid: Tensor) -> Tensor:
        """Return the features [B, ...] float32 of images [B, 3, S, S] in 0..255; ``valid`` is bool [B, S, S].

        Images go through one at a time: the batch must not influence an image's features, because a resumed run has
        other batches. On a CPU it is also faster (docs/performance.md).
        """
        with autocast(images.device):
            pixels = self.model.normalise(images, valid.unsqueeze(1))
            return torch.cat([self._prefix(image) for image in torch.split(pixels, 1)]).float()

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [B, C, S, S] of features [B, ...]; gradients flow to the trainable tensors."""
        if not self.has_prefix:
            features = self.model.backbone.stem(features)
        for module in self._after:
            features = module(features)
        return self.model.decode(features)

    def _prefix(self, pixels: Tensor) -> Tensor:
        if not self.has_prefix:
            return pixels
        x = self.model.backbone.stem(pixels)
        for module in self._before:
            x = module(x)
        return x


def cheaper_to_read(kept: int, operations: int, device: torch.device) -> bool:
    """Return whether ``device`` takes longer for ``operations`` than to get ``kept`` bytes of features from a file."""
    return operations > kept * (_CPU_OPERATIONS_PER_BYTE if device.type == "cpu" else _OPERATIONS_PER_BYTE)


class FeatureCache:
    """A file of one site's features as fp16, with one slot per row and view, filled at first use.

    The file is scratch: a run removes an earlier run's file when it starts, because after a power failure a slot can be
    marked as filled without its values.

    Args:
        path: the file; created with the first features.
        keys: the (row, view) pairs to cache, the most useful first.
        shape: of one image's features, without the batch.
        max_bytes: the file's largest size; as many of the first ``keys`` as fit have a slot, none for 0.
    """

    def __init__(self, path: Path, keys: Sequence[Key], shape: tuple[int, ...], max_bytes: int) -> None:
        self.path = path
        self.shape = shape
        self._slot_bytes = 1 + _FEATURE_BYTES * math.prod(shape)
        self._slots = {key: slot for slot, key in enumerate(keys[: max_bytes // self._slot_bytes])}
        self._disk_is_full = False

    def read(self, key: Key) -> Tensor | None:
        """Return the cached features, float32 on the CPU, or None."""
        slot = self._slots.get(key)
        if slot is None or not self.path.is_file():
            return None
        with self.path.open("rb", buffering=0) as file:
            file.seek(slot * self._slot_bytes)
            content = bytearray(self._slot_bytes)
            if file.readinto(content) < len(content) or not content.endswith(_FILLED):
                return None
        return torch.frombuffer(content, dtype=torch.float16, count=math.prod(self.shape)).reshape(self.shape).float()

    def store(self, key: Key, features: Tensor) -> Tensor:
        """Store features if their key has a slot, and return them on the CPU, rounded as ``read`` returns them.

        Features without a slot, or too large for fp16, are returned as they are, on their device. If the disk is full,
        the run continues without the cache: features are still rounded, and are computed again at each use.
        """
        slot = self._slots.get(key)
        if slot is None:
            return features
        rounded = features.to(dtype=torch.float16, device="cpu").contiguous()
        if not rounded.isfinite().all():
            return features
        if not self._disk_is_full:
            try:
                self._write(slot, rounded.numpy().tobytes() + _FILLED)
            except OSError as error:
                logger.warning("%s: features cannot be cached (%s); the run continues without", self.path, error)
                self._disk_is_full = True
        return rounded.float()

    def _write(self, slot: int, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.is_file() else "w+b", buffering=0) as file:
            file.seek(slot * self._slot_bytes)
            file.write(content)
