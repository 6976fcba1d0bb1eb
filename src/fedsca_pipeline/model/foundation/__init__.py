"""The frozen pretrained model: ``prepare_foundation`` fetches and verifies it, ``load_foundation`` builds it.

Names that need torch are imported on first use: verifying stored weights needs no heavy import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.model.foundation.blocks import BlockPaths
from fedsca_pipeline.model.foundation.provenance import Provenance
from fedsca_pipeline.model.foundation.weights import prepare_foundation

if TYPE_CHECKING:
    from fedsca_pipeline.model.foundation.build import load_foundation
    from fedsca_pipeline.model.foundation.model import SegmentationModel

__all__ = ["BlockPaths", "Provenance", "SegmentationModel", "load_foundation", "prepare_foundation"]

_LAZY = {"load_foundation": "build", "SegmentationModel": "model"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
