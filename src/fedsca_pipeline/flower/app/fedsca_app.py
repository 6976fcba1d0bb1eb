"""The only module of the app bundle: names the ServerApp and the ClientApp of the installed package."""

from __future__ import annotations

from fedsca_pipeline.flower.coordinator.relay import app as server
from fedsca_pipeline.flower.site.shim import app as site

__all__ = ["server", "site"]
