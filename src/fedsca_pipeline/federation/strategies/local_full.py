"""Local training of the whole foundation: what full fine-tuning is worth where nothing crosses the wire."""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.local import Local
from fedsca_pipeline.model.layout import TensorLayout


class LocalFull(Local):
    """Every site on its own, without adapters: they are attached as always, but never move from doing nothing."""

    name: ClassVar[str] = "local_full"

    def trained(self, layout: TensorLayout) -> tuple[str, ...]:
        """Return the foundation's own tensors, encoder and decoder."""
        return layout.encoder + layout.decoder
