"""The coordinator's nodes, where a site says what it should not."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from fedsca_pipeline.config import TrainingConfig
from fedsca_pipeline.errors import ConfigError, MessageError
from fedsca_pipeline.federation.fleet import Failure
from fedsca_pipeline.flower import documents, nodes, superlink
from fedsca_pipeline.runs import CONFIGURATION

PREPARED = {
    "site": "a", "version": f"{'0' * 16}-{'1' * 16}", "foundation": "ab" * 32, "train": 3, "validation": 1, "test": 1,
}  # fmt: skip


@pytest.fixture
def join(link, config, scripted, reply, monkeypatch) -> Callable[..., dict]:
    """Asks one site, which answers with these bytes, to join."""

    def asked(answer: bytes) -> dict:
        @contextmanager
        def opened(_config):
            yield link

        monkeypatch.setattr(superlink, "open_link", opened)
        link.sites = {"a": scripted(seconds=0.0, answer=lambda message: reply("", message.node, answer))}
        models = {key: model.model_validate({}) for key, model in CONFIGURATION.items()}
        models["run"] = models["run"].model_copy(update={"threads": 1})
        one = config.model_copy(update={"sites": ["a"]})
        return nodes.join({**models, "strategies": {}}, {"sha256": "ab" * 32}, one, TrainingConfig())

    return asked


def test_a_site_joins_with_counts_and_hashes(join) -> None:
    assert join(documents.write(documents.Prepared(**PREPARED))) == {"a": PREPARED}


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"patient": "7"}, MessageError, "^a: what it says of its data cannot be taken: Prepared: patient"),
        ({"site": "b"}, ConfigError, "^a: its node answers as b"),
        ({"foundation": "cd" * 32}, ConfigError, "^a: its foundation is cdcd"),
    ],
)
def test_what_a_site_may_not_say_ends_the_run_and_names_the_site(join, changed, error, said) -> None:
    with pytest.raises(error, match=said):
        join(json.dumps({**PREPARED, **changed}).encode())


ROW = dict.fromkeys(documents.Means.model_fields, 0.5) | {"model": "chosen", "label": 0, "one_empty": 0, "images": 1}
SCORES = {"site": "a", "run": "0" * 16, "means": [ROW], "volumes": [], "rounds": {}, "dice_validation": {}}


@pytest.mark.parametrize("changed", [{}, {"run": "1" * 16}, {"site": "b"}, {"means": [{**ROW, "label": 3}]}], ids=str)
def test_scores_of_another_site_run_or_number_of_classes_are_not_taken(changed) -> None:
    answer = documents.write(documents.Scores(**{**SCORES, **changed}))
    if not changed:
        assert nodes._scores("a", "0" * 16, answer, 2)["site"] == "a"
        return
    with pytest.raises(MessageError):
        nodes._scores("a", "0" * 16, answer, 2)


def test_of_a_silent_site_there_are_no_scores() -> None:
    with pytest.raises(MessageError, match="not connected"):
        nodes._scores("a", "0" * 16, Failure("not connected"), 1)
