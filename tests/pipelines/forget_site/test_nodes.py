from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsca_pipeline.errors import ConfigError, TrackingError
from fedsca_pipeline.pipelines.forget_site.nodes import forget_site


def mlflow(*sites: str, **own: Any) -> Any:
    """What is left of MLflow: the sites that have runs."""

    def forget(site: str) -> int:
        return sites.count(site)

    return SimpleNamespace(
        **{"runs_of": lambda site: [site] * sites.count(site), "forget": forget, "out_of_reach": list, **own}
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for folder in ("01_raw/north/images", "private/north", "03_primary/north", "03_primary/south", "01_raw/new/masks"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


def test_what_is_deleted_what_stays_and_what_is_out_of_reach_is_printed(root: Path, capsys) -> None:
    deleted = forget_site("north", False, root, root / "cells", mlflow("north"))

    said = capsys.readouterr().out
    assert deleted == [str(root / "03_primary" / "north")]
    assert "north: deleted 1 path and 1 MLflow run\n" in said
    assert f"  {root / '03_primary' / 'north'}\n" in said
    assert f"Still there: {root / '01_raw' / 'north'}, {root / 'private' / 'north'} (--params=site=north,delete" in said
    assert "Out of reach:\n  models of other sites" in said
    assert (root / "01_raw" / "north" / "images").is_dir()


def test_raw_data_go_only_if_that_is_asked_for(root: Path, capsys) -> None:
    forget_site("north", True, root, root / "cells", mlflow())

    assert not (root / "01_raw" / "north").exists()
    assert not (root / "private" / "north").exists()
    assert "Still there" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("nort", "site: nothing is kept of 'nort' in .* or MLflow; did you mean 'north'. Allowed: new, north, south"),
        ("../north", "nothing is kept of '../north'"),
        ("o'brien", "nothing is kept of"),
        (None, "site: not named; --params=site=<name> with one of new, north, south"),
    ],
)
def test_an_unknown_site_is_refused_with_near_names(root: Path, site: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        forget_site(site, True, root, root / "cells", mlflow())

    assert (root / "03_primary" / "north").is_dir()


def test_a_site_of_which_only_mlflow_knows_is_forgotten_there(root: Path, capsys) -> None:
    assert forget_site("old", False, root, root / "cells", mlflow("old", "old")) == []

    assert "old: deleted 0 paths and 2 MLflow runs" in capsys.readouterr().out


def test_nothing_is_deleted_while_mlflow_cannot_be_reached(root: Path) -> None:
    def unreachable(site: str) -> int:
        raise TrackingError("MLflow at x: gone")

    with pytest.raises(TrackingError):
        forget_site("north", True, root, root / "cells", mlflow(forget=unreachable))

    assert (root / "03_primary" / "north").is_dir()
