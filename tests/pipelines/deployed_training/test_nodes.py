"""The coordinator's nodes, where a site says what it should not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedsca_pipeline.config import Settings
from fedsca_pipeline.errors import ConfigError, MessageError, ResumeError
from fedsca_pipeline.federation.fleets.fleet import Failure
from fedsca_pipeline.federation.run import configuration_of, describe_run, finish_run, open_run
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.files import write_json
from fedsca_pipeline.flower.coordinator import superlink
from fedsca_pipeline.flower.coordinator.tasks import read_scores
from fedsca_pipeline.flower.messages import documents
from fedsca_pipeline.model.foundation import prepare_foundation
from fedsca_pipeline.pipelines.deployed_training import nodes

PREPARED = {
    "site": "a", "version": f"{'0' * 16}-{'1' * 16}", "foundation": "ab" * 32, "train": 3, "samples": 3,
    "validation": 1, "test": 1,
}  # fmt: skip


@pytest.fixture
def settings() -> dict[str, Any]:
    """Values of ``Settings``; a test may change them before it joins."""
    return {
        "run": {"threads": 1},
        "federation": {"quorum": 1, "grace": 0.02},
        "foundation": {"name": "random"},
        "preprocessing": {"image_size": 32},
    }


@pytest.fixture
def join(link, config, scripted, reply, settings, monkeypatch, tmp_path: Path) -> Callable[..., dict]:
    """Asks sites to join, each of which answers with these bytes, or is away."""

    @contextmanager
    def opened(_config):
        yield link

    def site(answer: bytes | None):
        if answer is None:
            return scripted(away=lambda now: True)
        return scripted(seconds=0.0, answer=lambda message: reply("", message.node, answer))

    def asked(
        force: bool = False, most: int = 1, bounds: dict[str, int] | None = None, **answers: bytes | None
    ) -> dict:
        monkeypatch.setattr(superlink, "open_link", opened)
        link.sites = {name: site(answer) for name, answer in answers.items()}
        sites = {site: (bounds or {}).get(site) for site in sorted(answers)}
        chosen = config.model_copy(update={"sites": sites, "poll": 0.01, "max_message": most})
        given, places = Settings(**settings), (tmp_path / "foundations", tmp_path / "checkpoints")
        prepare_foundation(given.foundation, places[0])
        return nodes.join(given, {"sha256": "ab" * 32}, force, chosen, *places)

    return asked


@pytest.fixture
def begun(settings, tmp_path: Path) -> dict[str, dict]:
    """What two sites have said of their data when a run began that is not finished."""
    said = {site: {**PREPARED, "site": site} for site in "ab"}
    description = describe_run(
        configuration_of(Settings(**settings)), {site: of["version"] for site, of in said.items()}, "ab" * 32, 1
    )
    write_json(open_run(tmp_path / "checkpoints", description, force=False).joined, said)
    return said


def test_an_unfinished_run_goes_on_without_a_site_that_is_away(join, begun, caplog) -> None:
    there = documents.write(documents.Prepared(**begun["a"]))

    assert join(a=there, b=None) == begun

    assert "b: not connected; the run resumes with the site's answer from its start" in caplog.text


@pytest.mark.parametrize("why", ["begun anew", "finished", "of another configuration"])
def test_any_other_run_waits_for_all(join, begun, why, settings, monkeypatch, tmp_path: Path) -> None:
    there = documents.write(documents.Prepared(**begun["a"]))
    if why == "finished":
        finish_run(tmp_path / "checkpoints")
    if why == "of another configuration":
        settings["run"]["seed"] = 7
    waits = []

    def quorum_of(*_, quorum: int, **__):
        waits.append(quorum)
        raise InterruptedError

    monkeypatch.setattr("fedsca_pipeline.flower.coordinator.fleet.FlowerFleet.ask", quorum_of)

    with pytest.raises(InterruptedError):
        join(force=why == "begun anew", a=there, b=None)

    assert waits == [2]


@pytest.mark.usefixtures("begun")
def test_damaged_answers_of_the_sites_are_named_with_the_cure(join, tmp_path: Path) -> None:
    (answers,) = (tmp_path / "checkpoints").rglob("joined_sites.json")
    answers.write_text("{")

    with pytest.raises(ResumeError, match=r"joined_sites\.json: damaged .*; delete it"):
        join(a=documents.write(documents.Prepared(**PREPARED)))


@pytest.mark.parametrize(("train", "said"), [(1, "1 image to train on"), (3, "3 images to train on")])
def test_a_site_joins_with_counts_and_hashes(join, caplog, train: int, said: str) -> None:
    prepared = {**PREPARED, "train": train}
    caplog.set_level(logging.INFO)

    assert join(a=documents.write(documents.Prepared(**prepared))) == {"a": prepared}

    assert f"a: {said}, 1 to validate" in caplog.text


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"patient": "7"}, MessageError, "^a: its answer on its data is refused: Prepared: patient"),
        ({"site": "b"}, ConfigError, "^a: its node answers as b"),
        ({"foundation": "cd" * 32}, ConfigError, "^a: its foundation is cdcd"),
    ],
)
def test_what_a_site_may_not_say_ends_the_run_and_names_the_site(join, changed, error, said) -> None:
    with pytest.raises(error, match=said):
        join(a=json.dumps({**PREPARED, **changed}).encode())


def test_a_site_may_claim_as_many_images_as_the_coordinators_list_allows(join) -> None:
    answer = documents.write(documents.Prepared(**PREPARED))

    assert join(a=answer, bounds={"a": 3}) == {"a": PREPARED}
    with pytest.raises(ConfigError, match=r"^a: it claims 3 training images and slices, and flower\.sites\.a allows 2"):
        join(a=answer, bounds={"a": 2})


def test_a_site_that_claims_another_number_of_the_same_images_does_not_resume(join, begun) -> None:
    answers = {site: documents.write(documents.Prepared(**said)) for site, said in begun.items()}
    lying = documents.write(documents.Prepared(**{**begun["b"], "samples": 2**31 - 1}))

    assert join(**answers) == begun
    with pytest.raises(ConfigError, match=r"^b: it claims 2147483647 .*, and 3 of the same data when the run began;"):
        join(**{**answers, "b": lying})


ROW = dict.fromkeys(documents.Means.model_fields, 0.5) | {"model": "chosen", "label": 0, "one_empty": 0, "images": 1}
SCORES = {"site": "a", "run": "0" * 16, "means": [ROW], "volumes": [], "rounds": {}, "dice_validation": {}}


@pytest.mark.parametrize("changed", [{}, {"run": "1" * 16}, {"site": "b"}, {"means": [{**ROW, "label": 3}]}], ids=str)
def test_scores_of_another_site_run_or_number_of_classes_are_not_taken(changed) -> None:
    answer = documents.write(documents.Scores(**{**SCORES, **changed}))
    if not changed:
        assert read_scores("a", "0" * 16, answer, 2)["site"] == "a"
        return
    with pytest.raises(MessageError):
        read_scores("a", "0" * 16, answer, 2)


def test_of_a_silent_site_there_are_no_scores() -> None:
    with pytest.raises(MessageError, match="not connected"):
        read_scores("a", "0" * 16, Failure("not connected"), 1)


@pytest.mark.parametrize("wire_dtype", ["fp32", "fp16", "int8"])
def test_a_run_whose_messages_are_too_large_is_refused_before_any_site_is_asked(
    join, link, settings, monkeypatch, wire_dtype: str
) -> None:
    monkeypatch.setattr(Strategy, "wire_shapes", lambda _: {"large": (2**20,)})
    settings["federation"]["wire_dtype"] = wire_dtype
    there = documents.write(documents.Prepared(**PREPARED))

    with pytest.raises(ConfigError, match=r"flower\.max_message allows 1 MiB") as refused:
        join(a=there)
    (needed,) = re.findall(r"set it to (\d+), and client_max_body_size in nginx\.conf to \d+m", str(refused.value))
    with pytest.raises(ConfigError, match=f"client_max_body_size in nginx.conf to {needed}m"):
        join(most=int(needed) - 1, a=there)

    assert link.pushed == []
    assert join(most=int(needed), a=there) == {"a": PREPARED}
