"""What the typed configuration refuses, and what it derives."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from fedsca_pipeline.config import FederationConfig, PreprocessingConfig, VolumeConfig


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
