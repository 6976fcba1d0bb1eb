"""What the protection officer is shown of a log, and what she is told where it is broken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fedsca_pipeline.cli import cli
from fedsca_pipeline.flower.audit.log import AuditLog, read_log
from fedsca_pipeline.flower.audit.table import Traffic, told, traffic_of
from fedsca_pipeline.flower.site.command import main

MANIFEST = {"run": "0123456789abcdef", "samples": 7, "metrics": {"loss": 0.5, "dice_local": 0.6}}
UPDATE = {"run": MANIFEST["run"], "manifest": MANIFEST, "tensors": {"low": ["F16", [2, 3]]}, "values": {"F16": 6}}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "work" / "audit.jsonl"
    with AuditLog(path) as audit:

        def add(direction, kind, round_, sent, content, answer_to=None):
            return audit.add(
                direction, site="a", kind=kind, round_=round_, sent=sent, content=content, answer_to=answer_to
            )

        terms = add("in", "prepare", 0, b"terms", {"run": None, "keys": ["code"]})
        add("out", "prepare", 0, b"hashes", {"run": None, "document": {"site": "a", "train": 3}}, terms)
        for answer in ({"run": None, "refused": "[red]it\x1b died"}, UPDATE):
            asked = add("in", "round", 1, b"aggregate", UPDATE)
            add("out", "round", 1, b"update", answer, asked)
    return path


@pytest.fixture
def kedro(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    return lambda *arguments: CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def test_messages_are_counted_by_run_round_and_kind_and_a_refusal_with_what_it_refused(log: Path) -> None:
    assert traffic_of(read_log(log)) == {
        ("", 0, "prepare"): Traffic(1, 5, 1, 6, 0, ["site, train"]),
        (MANIFEST["run"], 1, "round"): Traffic(
            2, 18, 2, 12, 1, ["refused: [red]it\x1b died", "1 tensors (6 F16), samples, dice_local, loss"]
        ),
    }


def test_a_message_is_told_in_a_few_words() -> None:
    assert told({"run": None, "unreadable": "not JSON"}) == "unreadable: not JSON"
    assert told({**UPDATE, "tensors": {}, "values": {}}) == "no tensor, samples, dice_local, loss"


def test_the_command_shows_the_table_and_the_last_hash_and_ends_well(log: Path, kedro) -> None:
    done = kedro(log)

    assert done.exit_code == 0
    assert "01234567" in done.output
    assert "1 tensors (6 F16)" in done.output
    assert "6 lines, the chain is whole" in done.output
    assert list(read_log(log))[-1]["hash"] in done.output
    # As written: neither markup nor what moves the cursor.
    assert "[red]it� died" in done.output


def test_the_command_names_the_first_broken_line_and_fails(log: Path, kedro) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3] + lines[4:]))

    done = kedro(log)

    assert done.exit_code == 1
    assert f"{log}: line 4 does not follow" in done.output


def test_a_cut_off_end_is_found_by_a_hash_that_is_known(log: Path, kedro) -> None:
    known = list(read_log(log))[-1]["hash"]
    assert kedro(log, "--known", known).exit_code == 0
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert kedro(log).exit_code == 0

    done = kedro(log, "--known", known)

    assert done.exit_code == 1
    assert known in done.output


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path, kedro) -> None:
    done = kedro(tmp_path / "audit.jsonl")

    assert done.exit_code == 1
    assert "cannot be read" in done.output


def test_the_sites_own_command_shows_its_log(log: Path, tmp_path: Path, capsys) -> None:
    for name in ("ca.crt", "a.key"):
        (tmp_path / name).touch()
    values = {"site": "a", "data": "data", "work": "work", "coordinator": "c:1"}
    values["certificates"] = {"authority": "ca.crt", "key": "a.key"}
    (tmp_path / "site.yml").write_text(yaml.safe_dump(values))

    assert main([str(tmp_path / "site.yml"), "--audit"]) == 0
    assert "6 lines, the chain is whole" in capsys.readouterr().out
    log.write_bytes(log.read_bytes().replace(b"loss", b"lass"))
    assert main([str(tmp_path / "site.yml"), "--audit"]) == os.EX_CONFIG
