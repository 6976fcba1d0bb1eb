from __future__ import annotations

import pytest

from fedsca_pipeline.config import FederationConfig, RunConfig
from fedsca_pipeline.federation.fleets import registry as fleet_kinds
from fedsca_pipeline.federation.fleets.registry import FLEETS, site_threads


def test_every_fleet_of_the_configuration_is_registered() -> None:
    assert set(FLEETS) == set(FederationConfig.model_fields["fleet"].annotation.__args__)


@pytest.mark.parametrize(
    ("federation", "threads"),
    [
        ({"fleet": "in_process"}, 8),
        ({"fleet": "processes"}, 2),
        ({"fleet": "processes", "workers": 2}, 4),
        ({"fleet": "processes", "workers": 3}, 2),
        ({"fleet": "processes", "workers": 100}, 2),
        ({"fleet": "processes", "participation": 0.5}, 4),
    ],
)
def test_the_cores_are_shared_by_the_sites_at_work(federation, threads: int, monkeypatch) -> None:
    monkeypatch.setattr(fleet_kinds, "available_cores", lambda: 8)

    assert site_threads(RunConfig(), FederationConfig(**federation), sites=4) == threads


@pytest.mark.parametrize("fleet", FLEETS)
def test_given_threads_are_those_of_one_site_in_every_fleet(fleet: str) -> None:
    assert site_threads(RunConfig(threads=3), FederationConfig(fleet=fleet), sites=4) == 3
