"""Local training: nothing crosses the wire; the baseline of every federated method."""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.base import Strategy, StrategyOptions


class LocalOptions(StrategyOptions):
    """``strategies.local``: no options."""


class Local(Strategy):
    """Every site trains alone."""

    name: ClassVar[str] = "local"
    Options: ClassVar[type[StrategyOptions]] = LocalOptions

    def shared(self) -> tuple[str, ...]:
        """Return no tensor."""
        return ()
