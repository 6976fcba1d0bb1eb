"""Fixtures that more than one test folder needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A loaded machine is not a failing law.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the Kedro project."""
    return PROJECT


@pytest.fixture(scope="session")
def foundation_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the real mobile_sam has been fetched, verified and converted once."""
    from fedsca_pipeline.config import FoundationConfig
    from fedsca_pipeline.foundation import prepare_foundation

    root = tmp_path_factory.mktemp("foundations")
    prepare_foundation(FoundationConfig(), root)
    return root


@pytest.fixture(scope="session")
def nuclei_root() -> Path:
    """The nuclei sites of docs/nuclei.md."""
    root = Path(os.environ.get("FEDSCA_NUCLEI", PROJECT.parent / "shared" / "data" / "nuclei"))
    if not root.is_dir():
        pytest.skip("the nuclei sites are not here; set FEDSCA_NUCLEI to their folder (docs/nuclei.md)")
    return root
