"""What the typed configuration refuses, and what it derives."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fedsca_pipeline.config import FederationConfig, PreprocessingConfig, Settings, VolumeConfig, read_parameters
from fedsca_pipeline.errors import ConfigError


def test_classes_without_names_are_called_by_number() -> None:
    assert PreprocessingConfig(classes=2).names == ("class 1", "class 2")
    assert PreprocessingConfig(classes=2, class_names=("tumour", "cyst")).names == ("tumour", "cyst")


def test_one_entry_alone_is_a_list_of_one_and_is_checked_as_such() -> None:
    assert PreprocessingConfig(class_names="tumour").names == ("tumour",)
    assert VolumeConfig(modalities=2).modalities == [2]
    assert VolumeConfig(modalities=None).modalities is None
    assert FederationConfig(devices="auto").devices is None
    assert FederationConfig(devices=1).devices == [1]
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        VolumeConfig(modalities=-1)
    with pytest.raises(ValidationError, match="at least 1 item"):
        VolumeConfig(modalities=[])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tumour"], "1 names for 2 classes"),
        (["tumour", "tumour"], "two classes have one name"),
        (["tumour", "tumour "], "two classes have one name"),
        (["tumour", ""], "class_names"),
        (["tumour", "a/b"], "class_names"),
        (["tumour", "cyst, large"], "class_names"),
        (["tumour", " -"], "class_names"),
        (["tumour", "x" * 41], "class_names"),
    ],
)
def test_class_names_that_are_too_few_alike_or_no_names_of_metrics_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PreprocessingConfig(classes=2, class_names=names)


def test_faults_of_parameters_are_listed_one_per_line_by_their_yaml_key() -> None:
    wrong = {
        "federation": {"rounds": 0, "rouns": 3},
        "preprocessing": {"split": {"validation": 0.9, "test": 0.8}},
        "foundation": {"name": "sam"},
    }

    with pytest.raises(ConfigError) as refused:
        read_parameters(wrong)

    assert sorted(str(refused.value).splitlines()) == [
        "federation.rounds: Input should be greater than or equal to 1 (given: 0)",
        "federation.rouns: Extra inputs are not permitted (given: 3)",
        "foundation: name: sam needs source, a local folder or a Hugging Face id",
        "preprocessing.split: split: validation and test together take 1.70 of the images",
    ]


def test_an_unknown_parameter_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="federations is no parameter; did you mean 'federation'"):
        read_parameters({"federations": {}})


def test_settings_are_the_groups_that_decide_a_run_and_cannot_be_changed() -> None:
    parameters = read_parameters({"run": {"seed": 3}, "force": True, "strategies": {"fedavg": None}})

    assert parameters.settings == Settings(run={"seed": 3}, strategies={"fedavg": {}})
    with pytest.raises(ValidationError, match="frozen"):
        parameters.settings.run.seed = 4


def test_the_options_of_the_chosen_strategy_default_to_none_given() -> None:
    settings = Settings(federation={"strategy": "fedsca"}, strategies={"fedsca": {"rho": 0.1}, "fedavg": {}})

    assert settings.strategy_options == {"rho": 0.1}
    assert Settings(federation={"strategy": "local"}).strategy_options == {}
