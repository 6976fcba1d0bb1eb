"""The documents that travel beside the rounds' messages."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from fedsca_pipeline.errors import ConfigError, DataError, MessageError
from fedsca_pipeline.evaluation.tables import IMAGE_COLUMNS
from fedsca_pipeline.flower import documents
from fedsca_pipeline.flower.worker import means_of, outward
from fedsca_pipeline.runs import CONFIGURATION

PREPARED = {
    "site": "a", "version": f"{'0' * 16}-{'1' * 16}", "foundation": "ab" * 32, "train": 3, "validation": 1, "test": 1,
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
    whole = {key: model.model_validate({}).model_dump(mode="json") for key, model in CONFIGURATION.items()}
    whole["strategies"] = {"fedsca": {}}

    assert documents.parameters(whole)["federation"].strategy == "fedsca"
    for faulty in ({**whole, "more": {}}, {**whole, "training": {"learning_rate": -1}}, {}):
        with pytest.raises(MessageError):
            documents.parameters(faulty)


def test_of_a_sites_scores_only_means_and_counts_leave_it() -> None:
    rows = [["a", f"patient_{i}", "chosen", 1, 0.5 + i / 10, 0.4, 3.0, float("nan"), ""] for i in range(3)]
    scores = pd.DataFrame(rows, columns=list(IMAGE_COLUMNS))

    means = means_of(scores)["chosen"]

    assert means.dice == pytest.approx(0.6)
    assert means.images == 3
    assert means.asd is None
    assert "patient" not in means.model_dump_json()


def test_a_data_error_is_told_without_its_files() -> None:
    assert "patient_7" not in outward(DataError("images/patient_7.png: unreadable"))
    assert "patient_7" not in outward(ValueError("patient_7"))
    assert outward(ConfigError("resources.most_threads is 2")) == "resources.most_threads is 2"
