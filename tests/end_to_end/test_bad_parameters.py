"""A wrong parameter stops a command before it does anything, named by its YAML key."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("federation.rounds=0", ["federation", "rounds", "greater than or equal to 1"]),
        ("federation.participation=1.5", ["federation", "participation", "less than or equal to 1"]),
        ("federation.max_share=0", ["federation", "max_share", "greater than 0"]),
        ("federation.max_share=2", ["federation", "max_share", "less than or equal to 1"]),
        ("federation.clip_to_median=2", ["federation", "clip_to_median", "valid boolean"]),
        ("federation.workers=0", ["federation", "workers", "greater than or equal to 1"]),
        ("federation.fleet=cluster", ["federation", "fleet", "'in_process', 'processes' or 'flower'"]),
        ("federation.rouns=3", ["federation", "rouns", "not permitted"]),
        ("training.augment.flip=3", ["training", "augment.flip", "less than or equal to 1"]),
        ("preprocessing.class_names=liver,tumour", ["preprocessing", "2 names for 1 classes"]),
        (
            "preprocessing.volume.modalities=[0,3],preprocessing.volume.channels=3",
            ["preprocessing", "channels: 3 takes"],
        ),
        ("run.seed=1,2", ["run.seed: ", "valid integer (given: [1, 2])"]),
        ("preprocessing.image_size=50", ["preprocessing", "image_size", "multiple of 16"]),
        ("foundation.name=sam", ["foundation", "name: sam needs source"]),
        ("federation.strategy=fedsda", ["federation.strategy", "did you mean 'fedsca'?"]),
        ("strategies.fedsca.rhoo=0.4", ["strategies.fedsca.rhoo", "did you mean 'rho'?"]),
        ("strategies.fedsca.rho=7", ["strategies.fedsca.rho is 7", "0 <= rho < 1"]),
        ("federations.rounds=3", ["federations is no parameter", "did you mean 'federation'?"]),
        ("colour=blue", ["colour is no parameter", "federation"]),
    ],
)
def test_a_wrong_parameter_is_named_and_nothing_is_written(workplace, params: str, said: list[str]) -> None:
    refused = workplace.run(params=params)

    assert refused.code == 1
    for expected in said:
        assert expected in refused.words
    assert "Traceback" not in refused.output
    assert workplace.contents() == {}
    assert workplace.parents() == []


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ("federation.inject_failures.nowhere=1", "federation"),
        ("federation.quorum=5", "federation.quorum: 5, but only 4 of 4 sites"),
    ],
)
def test_a_parameter_at_odds_with_the_sites_is_named(workplace, params: str, said: str) -> None:
    refused = workplace.run(params=params)

    assert refused.code == 1
    assert said in refused.words
    assert workplace.contents() == {}


def test_a_strategy_that_pools_images_is_refused_before_any_hospital_is_asked(workplace) -> None:
    pooling = "federation.strategy=centralised,strategies.centralised.allow_pooling=true"

    refused = workplace.run("federated_training", pooling, env="flower")

    assert refused.code == 1
    assert "federation.strategy: centralised pools images, and those of a deployed site stay there" in refused.words
    assert workplace.contents() == {}


@pytest.mark.slow
def test_a_quorum_of_sites_is_made_by_the_one_place_that_pools_them(workplace) -> None:
    pooling = "federation.strategy=centralised,strategies.centralised.allow_pooling=true"

    done = workplace.run(params=f"{pooling},federation.quorum=2,federation.rounds=1")

    assert done.code == 0, done.output
