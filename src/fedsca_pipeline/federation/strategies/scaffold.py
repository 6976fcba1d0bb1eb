"""SCAFFOLD: control variates correct the drift of local steps.

Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML 2020, algorithm 1. A site's
new control is the mean of its uncorrected gradients: with plain SGD that is the paper's option II to the letter, whose
``(x - y) / (K eta)`` would mean nothing after AdamW's steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.fedavg import FedAvg, FedAvgOptions
from fedsca_pipeline.federation.strategies.kernels import Groups, Replies
from fedsca_pipeline.federation.strategies.rules import LocalRule, Phase
from fedsca_pipeline.federation.strategies.server_step import Prior
from fedsca_pipeline.federation.strategies.sharing import PRIOR_HELP
from fedsca_pipeline.model.layout import TensorLayout

_CONTROL = "control:"  # no module path holds a colon


class ScaffoldOptions(FedAvgOptions):
    """``strategies.scaffold``."""

    prior: Prior = Field("uniform", description=PRIOR_HELP + "; the paper's is uniform")


class Scaffold(FedAvg):
    """FedAvg, where a step's gradient becomes ``g - c_i + c``; the controls double what is sent."""

    name: ClassVar[str] = "scaffold"
    Options: ClassVar[type[ScaffoldOptions]] = ScaffoldOptions

    def carried(self, layout: TensorLayout) -> Mapping[str, tuple[int, ...]]:
        """Return one control for each shared tensor: c on the way to a site, ``c + c_i' - c_i`` on the way back."""
        return {_CONTROL + name: layout.shapes[name] for name in self.shared(layout)}

    def groups(self, layout: TensorLayout) -> Groups:
        """Return the weights' columns and the controls'."""
        size = layout.size(self.shared(layout))
        return (slice(0, size), slice(size, 2 * size)) if size else ()

    def local_rule(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> LocalRule:
        """Return the correction of gradients."""
        return ControlRule(received, kept)

    def factors(self, replies: Replies, kept: Tensor, n_sites: int, groups: Groups) -> Tensor | None:
        """Return 1 for weights and A / N for controls: ``c`` moves by the sum of changes over N, all sites."""
        return torch.tensor([[1.0], [len(kept) / n_sites]]).double().expand(2, len(kept)) if groups else None


class ControlRule(LocalRule):
    """Corrects gradients by ``c - c_i`` and learns the new ``c_i``."""

    def __init__(self, received: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        super().__init__(received, kept)
        self._server = {name.removeprefix(_CONTROL): c for name, c in received.items() if name.startswith(_CONTROL)}
        self._own = {name: kept.get(name, torch.zeros_like(c)) for name, c in self._server.items()}
        self._sums = {name: torch.zeros_like(c) for name, c in self._server.items()}
        self._steps = 0

    def correct(self, parameters: Mapping[str, Tensor], phase: Phase) -> None:
        """Add ``c - c_i`` to the gradients."""
        self._steps += 1
        for name, control in self._server.items():
            gradient = parameters[name].grad
            if gradient is not None:
                self._sums[name] += gradient
                gradient += control - self._own[name]

    def kept(self) -> dict[str, Tensor]:
        """Return the new ``c_i``, by the names of the model's tensors."""
        return {name: total / max(self._steps, 1) for name, total in self._sums.items()}

    def carried(self) -> dict[str, Tensor]:
        """Return ``c + c_i' - c_i``."""
        return {_CONTROL + name: self._server[name] + new - self._own[name] for name, new in self.kept().items()}
