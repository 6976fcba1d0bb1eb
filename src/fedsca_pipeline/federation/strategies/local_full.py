"""Local training of the whole foundation: full fine-tuning when nothing crosses the wire."""

from __future__ import annotations

from typing import ClassVar

from fedsca_pipeline.federation.strategies.local import Local


class LocalFull(Local):
    """Every site trains alone; adapters are attached as always, but stay at their start, which has no effect."""

    name: ClassVar[str] = "local_full"

    def trained(self) -> tuple[str, ...]:
        """Return the foundation's own tensors, encoder and decoder."""
        return self.layout.encoder + self.layout.decoder
