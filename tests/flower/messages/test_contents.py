"""Only messages on a fixed list may leave a site, whatever its worker answers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.messages.codec import encode
from fedsca_pipeline.federation.messages.manifest import Manifest
from fedsca_pipeline.flower.messages import documents
from fedsca_pipeline.flower.messages.contents import answer_content, check_tensors, request_content

MOST = 2**20
MANIFEST = Manifest(
    kind="update", run="0" * 16, round=1, site="a", base_hash="1" * 16, samples=3, dtype="fp16", relative=True,
    metrics={"loss": 0.5},
)  # fmt: skip
TENSORS = {"low": torch.zeros(2, 3), "also_low": torch.zeros(4)}


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_an_update_is_described_by_tensor_names_value_counts_and_metrics(compression) -> None:
    content = answer_content("round", encode(MANIFEST, TENSORS, compression), MOST)

    assert content["run"] == MANIFEST.run
    assert content["tensors"] == {"low": ["F16", [2, 3]], "also_low": ["F16", [4]]}
    assert content["values"] == {"F16": 10}
    assert content["manifest"]["metrics"] == {"loss": 0.5}
    assert content["manifest"]["samples"] == 3
    json.dumps(content, allow_nan=False)


def test_a_document_that_leaves_a_site_is_logged_whole() -> None:
    opened = documents.Opened(site="a", run="0" * 16)

    content = answer_content("open", documents.write(opened), MOST)

    assert content == {"run": "0" * 16, "document": {"site": "a", "run": "0" * 16}}


@pytest.mark.parametrize(
    ("kind", "answer", "reason"),
    [
        ("round", encode(replace(MANIFEST, metrics={"age": 71.0}), TENSORS), "metric age"),
        ("round", encode(replace(MANIFEST, metrics={"loss": float("nan")}), TENSORS), "not finite"),
        ("round", encode(replace(MANIFEST, kind="aggregate"), TENSORS), "kind aggregate"),
        ("round", encode(replace(MANIFEST, base_hash="patient 7"), TENSORS), "base_hash has an invalid form"),
        ("round", encode(replace(MANIFEST, run="0" * 16 + "\n"), TENSORS), "run has an invalid form"),
        ("round", b"raw pixels", "not safetensors"),
        ("open", b'{"site": "patient 7", "run": "0000000000000000"}', "site"),
        ("round", encode(MANIFEST, {"x" * 2**19: torch.zeros(1), "y" * 2**19: torch.zeros(1)}), "names and shapes"),
        ("open", documents.write(documents.FinishRequest(run="0" * 16)), "site"),
        ("shell", b"{}", "may not leave a site"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_that_is_not_on_the_list_may_not_leave(kind, answer, reason) -> None:
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
def test_an_answer_may_hold_only_the_tensors_of_the_message_that_it_answers(tensors, others) -> None:
    asked = encode(replace(MANIFEST, kind="aggregate", dtype="fp32", relative=False), TENSORS)
    request = request_content("round", asked, MOST)

    check_tensors(answer_content("round", encode(MANIFEST, TENSORS), MOST), request)
    check_tensors(answer_content("round", encode(replace(MANIFEST, kind="report"), {}), MOST), request)
    for unexpected in (request, request_content("round", b"unreadable", MOST)):
        with pytest.raises(MessageError, match=others):
            check_tensors(answer_content("round", encode(MANIFEST, tensors), MOST), unexpected)


def test_a_document_to_a_site_is_described_by_its_keys() -> None:
    assert request_content("open", b'{"fingerprint": "abc", "threads": 1}', MOST) == {
        "run": "abc",
        "keys": ["fingerprint", "threads"],
    }


@pytest.mark.parametrize("payload", [b"", b"[]", b"[" * 100_000, b" " * 2**19, b"\xff"])
def test_a_request_that_cannot_be_read_is_described_as_unreadable(payload) -> None:
    for kind in ("open", "round"):
        content = request_content(kind, payload, MOST)
        assert content["unreadable"]
        assert content["run"] is None
