"""Local training: nothing crosses the wire; the yardstick of every federated method."""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions
from fedsca_pipeline.model.layout import TensorLayout


class LocalOptions(StrategyOptions):
    """``strategies.local``: it has none."""


class Local(Strategy):
    """Every site on its own."""

    name: ClassVar[str] = "local"
    Options: ClassVar[type[LocalOptions]] = LocalOptions

    def shared(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return no tensor."""
        return ()
