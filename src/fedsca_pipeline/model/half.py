"""Frozen weights in half precision while a model trains under autocast.

Autocast casts a weight at every use, and keeps the cast only of a weight that trains. The values are the same.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HalfWeights:
    """Copies, in ``dtype``, of the frozen weights that autocast would cast; of no weight if ``dtype`` is None.

    These are weights and biases of linear and convolutional layers. A layer inside a layer of PEFT is left out, because
    an adapter may compute with its weights.

    Args:
        model: on its device, fp32.
        trained: names of the parameters that change.
        dtype: of autocast on the model's device.
    """

    def __init__(self, model: nn.Module, trained: Container[str], dtype: torch.dtype | None) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for name, layer in model.named_modules() if dtype else ():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and not name.endswith(".base_layer"):
                self._pairs += [
                    (parameter, parameter.detach().to(dtype))
                    for own, parameter in layer.named_parameters(prefix=name)
                    if own not in trained
                ]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Run a block, which must be under autocast, on the copies; the model has its own values again afterwards."""
        own = [parameter.data for parameter, _ in self._pairs]
        for parameter, half in self._pairs:
            parameter.data = half
        try:
            yield
        finally:
            for (parameter, _), value in zip(self._pairs, own, strict=True):
                parameter.data = value
