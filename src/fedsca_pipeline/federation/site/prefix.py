"""The part of a model that stands before its first adapter: frozen, so what it makes of an image can be kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fedsca_pipeline.compute import autocast
from fedsca_pipeline.model.foundation.model import SegmentationModel

Key = tuple[int, int]

logger = logging.getLogger(__name__)

_FEATURE_BYTES = 2  # fp16
_FILLED = b"\1"  # ends a slot, so that half a write leaves it empty


class SplitModel:
    """A model cut before its first trainable tensor: ``logits(features(images, valid))`` is the model's own forward.

    Where the stem itself is trained, nothing is frozen: features are the normalised pixels, and not worth keeping.

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

    @cached_property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        parameter = next(self.model.parameters())
        side = self.model.image_size
        nothing = torch.zeros(1, 3, side, side, device=parameter.device)
        return tuple(self.features(nothing, nothing[:, 0] > 0).shape[1:])

    @torch.no_grad()
    def features(self, images: Tensor, valid: Tensor) -> Tensor:
        """Return what the frozen prefix makes, [B, ...] float32, of images [B, 3, S, S] in 0..255.

        ``valid`` is bool [B, S, S]. Image by image: what becomes of one must not depend on its company, which differs
        after a resume. On a CPU it is the quicker way, too (docs/performance.md).
        """
        with autocast(images.device):
            pixels = self.model.normalise(images, valid.unsqueeze(1))
            return torch.cat([self._prefix(image) for image in pixels.split(1)]).float()

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


class FeatureCache:
    """Features of one site's images as fp16 in one file, a slot a row and view, filled as they are first met.

    The file is scratch: whoever starts a run removes what an earlier one left (a machine that lost power may have kept
    a slot's mark without its values).

    Args:
        path: the file; made when the first features come.
        keys: the (row, view) pairs worth keeping, the most wanted first.
        shape: of one image's features, without the batch.
        max_bytes: the file never grows beyond it, and keeps the first of ``keys``; 0 keeps nothing.
    """

    def __init__(self, path: Path, keys: Sequence[Key], shape: tuple[int, ...], max_bytes: int) -> None:
        self.path = path
        self.shape = shape
        self._slot_bytes = 1 + _FEATURE_BYTES * math.prod(shape)
        self._slots = {key: slot for slot, key in enumerate(keys[: max_bytes // self._slot_bytes])}
        self._disk_is_full = False

    def read(self, key: Key) -> Tensor | None:
        """Return what is kept, float32 on the CPU, or None."""
        slot = self._slots.get(key)
        if slot is None or not self.path.is_file():
            return None
        with self.path.open("rb", buffering=0) as file:
            file.seek(slot * self._slot_bytes)
            found = bytearray(self._slot_bytes)
            if file.readinto(found) < len(found) or not found.endswith(_FILLED):
                return None
        return torch.frombuffer(found, dtype=torch.float16, count=math.prod(self.shape)).reshape(self.shape).float()

    def keep(self, key: Key, features: Tensor) -> Tensor:
        """Keep features, and return them as ``read`` will; of a key that is not kept as they are, on the CPU.

        A full disk costs the cache, not the run: the features are rounded all the same, and met again they are computed
        again. Features too large for fp16 are handed out as they are, and not kept.
        """
        slot = self._slots.get(key)
        if slot is None:
            return features.cpu()
        rounded = features.to(dtype=torch.float16, device="cpu").contiguous()
        if not rounded.isfinite().all():
            return features.cpu()
        if not self._disk_is_full:
            try:
                self._write(slot, rounded.numpy().tobytes() + _FILLED)
            except OSError as error:
                logger.warning("%s: features cannot be kept (%s); going on without", self.path, error)
                self._disk_is_full = True
        return rounded.float()

    def _write(self, slot: int, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.is_file() else "w+b", buffering=0) as file:
            file.seek(slot * self._slot_bytes)
            file.write(content)
