"""The app bundle's only module: both apps are the installed package's."""

from __future__ import annotations

from fedsca_pipeline.flower.coordinator.relay import app as server
from fedsca_pipeline.flower.site.shim import app as site

__all__ = ["server", "site"]
