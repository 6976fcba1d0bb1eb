"""Node of the foundation pipeline."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import FoundationConfig

logger = logging.getLogger(__name__)


def fetch_foundation(foundations: Path, config: FoundationConfig) -> dict[str, Any]:
    """Return the foundation's provenance; fetch the weights if they are missing or damaged."""
    from fedsca_pipeline.model.foundation import prepare_foundation

    return dataclasses.asdict(prepare_foundation(config, foundations, announce=logger.info))
