"""The documents that travel beside the rounds' messages."""

from __future__ import annotations

import json

import pytest

from fedsca_pipeline.config import Settings
from fedsca_pipeline.errors import ConfigError, DataError, MessageError, WeightsError
from fedsca_pipeline.flower.messages import documents
from fedsca_pipeline.flower.site.worker import outward

PREPARED = {
    "site": "a", "version": f"{'0' * 16}-{'1' * 16}", "foundation": "ab" * 32, "train": 3, "samples": 3,
    "validation": 1, "test": 1,
}  # fmt: skip


def test_a_document_comes_back_as_it_was_written() -> None:
    prepared = documents.Prepared(**PREPARED)

    assert documents.read(documents.Prepared, documents.write(prepared)) == prepared


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "patient_007.png"},
        {"version": "patient_007"},
        {"train": "3"},
        {"train": 0},
        {"foundation": "../../etc/passwd"},
    ],
)
def test_a_document_of_any_other_form_is_refused(changed) -> None:
    with pytest.raises(MessageError, match="Prepared"):
        documents.read(documents.Prepared, json.dumps({**PREPARED, **changed}).encode())


def test_no_document_may_be_large() -> None:
    with pytest.raises(MessageError, match="larger than"):
        documents.read(documents.Prepared, b" " * (documents.MOST_BYTES + 1))


def test_a_configuration_is_taken_whole_and_known_or_not_at_all() -> None:
    whole = Settings(strategies={"fedsca": {}}).model_dump(mode="json")

    assert documents.settings(whole).federation.strategy == "fedsca"
    no_options = [{**whole, "strategies": strategies} for strategies in ([], {"fedsca": []}, None)]
    for faulty in ({**whole, "more": {}}, {**whole, "training": {"learning_rate": -1}}, {}, *no_options):
        with pytest.raises(MessageError):
            documents.settings(faulty)


ROW = {
    "model": "chosen", "label": 0, "one_empty": 0, "images": 3, "dice": 0.5, "iou": 0.4, "hd95": 3.0, "asd": 1.0,
    "dice_std": 0.1, "iou_std": 0.1, "hd95_std": 1.0, "asd_std": 0.5,
}  # fmt: skip
SCORES = {
    "site": "a", "run": "0" * 16, "means": [ROW], "volumes": [], "rounds": {"best": 1},
    "dice_validation": {"best": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"means": [{**ROW, "dice": 1.5}]},
        {"means": [{**ROW, "dice": None}]},
        {"means": [{**ROW, "images": -1}]},
        {"means": [{**ROW, "model": "patient_7"}]},
        {"means": [{**ROW, "patient": "7"}]},
        {"rounds": {"patient_7": 1}},
        {"volumes": [ROW]},
    ],
    ids=str,
)
def test_scores_have_no_room_for_more_than_means_and_counts(changed) -> None:
    documents.read(documents.Scores, json.dumps(SCORES).encode())
    with pytest.raises(MessageError):
        documents.read(documents.Scores, json.dumps({**SCORES, **changed}).encode())


@pytest.mark.parametrize(
    ("rows", "classes", "fits"),
    [
        ([{**ROW, "label": label} for label in (0, 1, 2)], 2, True),
        ([{**ROW, "label": 0}], 1, True),
        ([{**ROW, "label": 3}], 2, False),
        ([{**ROW, "label": 1}], 1, False),
        ([ROW, ROW], 1, False),
    ],
)
def test_scores_are_of_the_runs_classes_once_each(rows, classes, fits) -> None:
    scores = documents.read(documents.Scores, json.dumps({**SCORES, "means": rows}).encode())
    if fits:
        scores.check_classes(classes)
    else:
        with pytest.raises(MessageError, match="other classes"):
            scores.check_classes(classes)


def test_a_data_error_is_told_without_its_files() -> None:
    assert "patient_7" not in outward(DataError("images/patient_7.png: unreadable"))
    assert "patient_7" not in outward(ValueError("patient_7"))
    assert "patient_7" not in outward(WeightsError("/data/patient_7/last.safetensors: cannot be read"))
    assert outward(ConfigError("resources.most_threads is 2")) == "resources.most_threads is 2"
