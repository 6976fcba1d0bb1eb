"""Node of the foundation."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import FoundationConfig

logger = logging.getLogger(__name__)


def fetch_foundation(foundations: Path, config: FoundationConfig) -> dict[str, Any]:
    """Fetch and verify the foundation if it is not there yet; return its provenance."""
    from fedsca_pipeline.model.foundation import prepare_foundation

    return dataclasses.asdict(prepare_foundation(config, foundations, announce=logger.info))
