"""DVC depends on the parameters in force, and knows the sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsca_pipeline.config import DataReportConfig, DemoSitesConfig, Settings
from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.pipelines.in_force.nodes import write_in_force


def written(raw: Path, sites: list[str], **settings: Any) -> dict[str, Any]:
    stages = {"vars": [{"sites": sites}]}
    return write_in_force(Settings(**settings), DemoSitesConfig(), DataReportConfig(), raw, stages)


def test_the_values_are_those_in_force(tmp_path: Path) -> None:
    default = written(tmp_path, [*DEMO_SITES])
    changed = written(tmp_path, [*DEMO_SITES], run={"seed": 7})

    assert changed["run"]["seed"] == 7
    assert changed != default
    assert {**changed, "run": default["run"]} == default


@pytest.mark.parametrize(
    ("there", "named", "said"),
    [
        (["north", "south"], ["north"], "add south"),
        (["north"], ["north", "old"], "take out old"),
        (["north"], ["nroth"], "add north, take out nroth"),
        ([], ["north"], "add harbour_ct, .*take out north"),
    ],
)
def test_sites_that_the_list_of_dvc_yaml_lacks_or_has_too_many_are_named(
    tmp_path: Path, there: list[str], named: list[str], said: str
) -> None:
    for site in there:
        (tmp_path / site / "images").mkdir(parents=True)

    with pytest.raises(DataError, match=f"dvc.yaml: vars: sites .*: {said}"):
        written(tmp_path, named)


def test_every_stage_depends_on_the_parameters_in_force_and_on_no_single_file(project: Path, tmp_path: Path) -> None:
    stages = yaml.safe_load((project / "dvc.yaml").read_text())
    values = written(tmp_path, stages["vars"][0]["sites"])

    assert stages["stages"]["in_force"]["always_changed"] is True
    for name, stage in stages["stages"].items():
        # A preset in KEDRO_ENV has another data root, and the files here are those of this one.
        assert "kedro run --params=data_root=data " in stage["cmd"], name
        if name == "in_force":
            continue
        ((path, keys),) = stage["params"][0].items()
        assert path == "data/02_intermediate/in_force.json"
        for key in keys:
            group, _, rest = key.partition(".")
            assert group in values
            assert not rest or rest in values[group]
