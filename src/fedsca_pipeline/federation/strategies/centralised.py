"""Centralised training: one model on the pooled data of all sites, an upper bound that privacy rules out."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.federation.strategies.base import StrategyOptions
from fedsca_pipeline.federation.strategies.local import Local


class CentralisedOptions(StrategyOptions):
    """``strategies.centralised``."""

    allow_pooling: bool = Field(False, description="true: all sites agree that one machine holds all their images")

    @property
    def permitted(self) -> bool:
        """Whether ``allow_pooling`` is true."""
        return self.allow_pooling


class Centralised(Local):
    """Local training at one pooled site."""

    name: ClassVar[str] = "centralised"
    Options: ClassVar[type[CentralisedOptions]] = CentralisedOptions
    pools: ClassVar[bool] = True

    @classmethod
    def check_use(cls, options: StrategyOptions, adapter_method: str) -> None:
        """Raise ConfigError unless ``allow_pooling`` is true."""
        super().check_use(options, adapter_method)
        if not options.permitted:
            raise ConfigError(
                "strategies.centralised.allow_pooling is false: centralised training puts the images of all sites on "
                "one machine. Set it to true if every site has agreed to that."
            )
