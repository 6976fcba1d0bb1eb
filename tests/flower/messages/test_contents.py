"""What may leave a site is on a list, whatever its worker says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.messages.codec import encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.flower.messages import documents
from fedsca_pipeline.flower.messages.contents import answer_content, check_tensors, question_content

MOST = 2**20
MANIFEST = Manifest(
    kind="update", run="0" * 16, round=1, site="a", base_hash="1" * 16, samples=3, dtype="fp16", relative=True,
    metrics={"loss": 0.5},
)  # fmt: skip
TENSORS = {"low": torch.zeros(2, 3), "also_low": torch.zeros(4)}


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_an_update_is_told_by_names_numbers_of_values_and_metrics(compression) -> None:
    content = answer_content("round", encode(MANIFEST, TENSORS, compression), MOST)

    assert content["run"] == MANIFEST.run
    assert content["tensors"] == {"low": ["F16", [2, 3]], "also_low": ["F16", [4]]}
    assert content["values"] == {"F16": 10}
    assert content["manifest"]["metrics"] == {"loss": 0.5}
    assert content["manifest"]["samples"] == 3
    json.dumps(content, allow_nan=False)


def test_a_document_that_leaves_is_kept_whole() -> None:
    opened = documents.Opened(site="a", run="0" * 16)

    content = answer_content("open", documents.write(opened), MOST)

    assert content == {"run": "0" * 16, "document": {"site": "a", "run": "0" * 16}}


@pytest.mark.parametrize(
    ("kind", "answer", "reason"),
    [
        ("round", encode(replace(MANIFEST, metrics={"age": 71.0}), TENSORS), "metric age"),
        ("round", encode(replace(MANIFEST, metrics={"loss": float("nan")}), TENSORS), "not finite"),
        ("round", encode(replace(MANIFEST, kind="aggregate"), TENSORS), "kind aggregate"),
        ("round", encode(replace(MANIFEST, base_hash="patient 7"), TENSORS), "base_hash of another form"),
        ("round", encode(replace(MANIFEST, run="0" * 16 + "\n"), TENSORS), "run of another form"),
        ("round", b"raw pixels", "not safetensors"),
        ("open", b'{"site": "patient 7", "run": "0000000000000000"}', "site"),
        ("round", encode(MANIFEST, {"x" * 2**19: torch.zeros(1), "y" * 2**19: torch.zeros(1)}), "names and shapes"),
        ("open", documents.write(documents.Finished(run="0" * 16)), "site"),
        ("shell", b"{}", "nothing of the kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_else_may_not_leave(kind, answer, reason) -> None:
    with pytest.raises(MessageError, match=reason):
        answer_content(kind, answer, 2**22)


@pytest.mark.parametrize(
    ("tensors", "others"),
    [
        ({**TENSORS, "decoder": torch.zeros(5)}, r"decoder \[5\]"),
        ({"low": torch.zeros(3, 2)}, r"low \[3, 2\]"),
    ],
    ids=["another name", "another shape"],
)
def test_an_answer_holds_no_tensors_but_those_of_the_message_that_it_answers(tensors, others) -> None:
    asked = encode(replace(MANIFEST, kind="aggregate", dtype="fp32", relative=False), TENSORS)
    question = question_content("round", asked, MOST)

    check_tensors(answer_content("round", encode(MANIFEST, TENSORS), MOST), question)
    check_tensors(answer_content("round", encode(replace(MANIFEST, kind="report"), {}), MOST), question)
    for unexpected in (question, question_content("round", b"unreadable", MOST)):
        with pytest.raises(MessageError, match=others):
            check_tensors(answer_content("round", encode(MANIFEST, tensors), MOST), unexpected)


def test_a_question_is_told_by_its_keys() -> None:
    assert question_content("open", b'{"fingerprint": "abc", "threads": 1}', MOST) == {
        "run": "abc",
        "keys": ["fingerprint", "threads"],
    }


@pytest.mark.parametrize("payload", [b"", b"[]", b"[" * 100_000, b" " * 2**19, b"\xff"])
def test_a_question_that_cannot_be_read_is_said_to_be_so(payload) -> None:
    for kind in ("open", "round"):
        content = question_content(kind, payload, MOST)
        assert content["unreadable"]
        assert content["run"] is None
