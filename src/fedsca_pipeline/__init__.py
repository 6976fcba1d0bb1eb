"""Federated fine-tuning of segmentation foundation models for hospitals, after FedSCA (arXiv 2503.15390)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsca_pipeline.model.site_model import load_site_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_site_model"]


def __getattr__(name: str) -> Any:
    # torch and peft take seconds to import; the command line must not pay for them.
    if name == "load_site_model":
        from fedsca_pipeline.model.site_model import load_site_model

        return load_site_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
