"""The documents between coordinator and sites have fixed forms without room for private data."""

from __future__ import annotations

import json

import pytest

from fedsca_pipeline.config import Settings
from fedsca_pipeline.errors import ConfigError, DataError, MessageError, WeightsError
from fedsca_pipeline.flower.messages import documents
from fedsca_pipeline.flower.site.worker import public_reason

PREPARED = {
    "site": "a", "version": f"{'0' * 16}-{'1' * 16}", "foundation": "ab" * 32, "train": 3, "samples": 3,
    "validation": 1, "test": 1,
}  # fmt: skip


def test_a_document_survives_write_and_read() -> None:
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


def test_a_large_document_is_refused() -> None:
    with pytest.raises(MessageError, match="larger than"):
        documents.read(documents.Prepared, b" " * (documents.MAX_BYTES + 1))


def test_a_configuration_with_an_unknown_missing_or_invalid_key_is_refused() -> None:
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
def test_scores_can_hold_only_means_and_counts(changed) -> None:
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
def test_scores_have_at_most_one_row_per_class_of_the_run(rows, classes, fits) -> None:
    scores = documents.read(documents.Scores, json.dumps({**SCORES, "means": rows}).encode())
    if fits:
        scores.check_classes(classes)
    else:
        with pytest.raises(MessageError, match="other classes"):
            scores.check_classes(classes)


def test_the_reason_for_the_coordinator_does_not_name_files() -> None:
    assert "patient_7" not in public_reason(DataError("images/patient_7.png: unreadable"))
    assert "patient_7" not in public_reason(ValueError("patient_7"))
    assert "patient_7" not in public_reason(WeightsError("/data/patient_7/last.safetensors: cannot be read"))
    assert public_reason(ConfigError("resources.most_threads is 2")) == "resources.most_threads is 2"
