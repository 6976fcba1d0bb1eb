"""SCAFFOLD: control variates correct the drift of local steps.

Karimireddy et al., *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, ICML 2020, algorithm 1. A site's
new control is the mean of its uncorrected gradients. With plain SGD that is exactly the paper's option II, whose
``(x - y) / (K eta)`` has no meaning after steps of AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedsca_pipeline.federation.strategies.base import Groups, LocalRule, Phase, Prior, Replies
from fedsca_pipeline.federation.strategies.fedavg import FedAvg, FedAvgOptions
from fedsca_pipeline.federation.strategies.sharing import PRIOR_HELP

_CONTROL = "control:"  # no module path contains a colon


class ScaffoldOptions(FedAvgOptions):
    """``strategies.scaffold``."""

    prior: Prior = Field("uniform", description=PRIOR_HELP + "; the paper's is uniform")


class Scaffold(FedAvg):
    """FedAvg with gradients ``g - c_i + c``; the controls double the number of values on the wire."""

    name: ClassVar[str] = "scaffold"
    Options: ClassVar[type[ScaffoldOptions]] = ScaffoldOptions

    def extra_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return one control per shared tensor: c on the way to a site, ``c + c_i' - c_i`` on the way back."""
        return {_CONTROL + name: self.layout.shapes[name] for name in self.shared()}

    def groups(self) -> Groups:
        """Return the columns of the weights and those of the controls."""
        size = self.layout.size(self.shared())
        return (slice(0, size), slice(size, 2 * size)) if size else ()

    def local_rule(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LocalRule:
        """Return the correction of gradients."""
        return ControlRule(received, state)

    def scales(self, replies: Replies, rows: Tensor, n_sites: int, prior: Tensor) -> Tensor | None:
        """Return 1 for weights and A / N for controls: ``c`` moves by the sum of changes divided by N, all sites."""
        return torch.tensor([[1.0], [len(rows) / n_sites]]).double().expand(2, len(rows)) if self.groups() else None


class ControlRule(LocalRule):
    """Corrects gradients by ``c - c_i`` and computes the new ``c_i``."""

    def __init__(self, received: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        super().__init__(received, state)
        self._server = {name.removeprefix(_CONTROL): c for name, c in received.items() if name.startswith(_CONTROL)}
        self._own = {name: state.get(name, torch.zeros_like(c)) for name, c in self._server.items()}
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

    def next_state(self) -> dict[str, Tensor]:
        """Return the new ``c_i``, by the names of the model's tensors."""
        return {name: total / max(self._steps, 1) for name, total in self._sums.items()}

    def extra_tensors(self) -> dict[str, Tensor]:
        """Return ``c + c_i' - c_i``."""
        return {_CONTROL + name: self._server[name] + new - self._own[name] for name, new in self.next_state().items()}
