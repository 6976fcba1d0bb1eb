"""``fedsca-site --audit`` checks a log and shows it as a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedsca_pipeline.flower.audit.log import AuditLog, read_log
from fedsca_pipeline.flower.audit.table import Traffic, describe, traffic_of
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
def audit(monkeypatch, capsys, caplog) -> Callable[..., tuple[int, str]]:
    """Runs ``fedsca-site --audit`` and returns its status and all that it prints and logs."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str | Path) -> tuple[int, str]:
        caplog.clear()
        status = main(["--audit", *map(str, arguments)])
        return status, capsys.readouterr().out + caplog.text

    return run


def test_messages_are_counted_by_run_round_and_kind_and_a_refusal_with_the_message_it_refuses(log: Path) -> None:
    assert traffic_of(read_log(log)) == {
        ("", 0, "prepare"): Traffic(1, 5, 1, 6, 0, ["site, train"]),
        (MANIFEST["run"], 1, "round"): Traffic(
            2, 18, 2, 12, 1, ["refused: [red]it\x1b died", "1 tensor (6 F16), samples, dice_local, loss"]
        ),
    }


def test_a_message_is_described_in_a_few_words() -> None:
    assert describe({"run": None, "unreadable": "not JSON"}) == "unreadable: not JSON"
    assert describe({**UPDATE, "tensors": {}, "values": {}}) == "no tensor, samples, dice_local, loss"


def test_the_command_shows_the_table_and_the_last_hash_and_succeeds(log: Path, audit) -> None:
    status, output = audit(log)

    assert status == 0
    assert "01234567" in output
    assert "1 tensor (6 F16)" in output
    assert "6 lines, the chain is intact" in output
    assert list(read_log(log))[-1]["hash"] in output
    # Shown as written: no markup is interpreted, and nothing moves the cursor.
    assert "[red]it� died" in output


def test_the_command_names_the_first_broken_line_and_fails(log: Path, audit) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3] + lines[4:]))

    status, output = audit(log)

    assert status == os.EX_CONFIG
    assert f"{log}: line 4 does not follow" in output


def test_a_truncated_log_is_found_by_a_known_hash(log: Path, audit) -> None:
    known = list(read_log(log))[-1]["hash"]
    assert audit(log, "--known", known)[0] == 0
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    assert audit(log)[0] == 0

    status, output = audit(log, "--known", known)

    assert status == os.EX_CONFIG
    assert known in output


def test_a_missing_log_is_an_error(tmp_path: Path, audit) -> None:
    status, output = audit(tmp_path / "audit.jsonl")

    assert status == os.EX_CONFIG
    assert "cannot be read" in output


def test_with_a_sites_yaml_file_the_command_shows_the_log_of_that_site(log: Path, tmp_path: Path, audit) -> None:
    for name in ("ca.crt", "a.key"):
        (tmp_path / name).touch()
    values = {"site": "a", "data": "data", "work": "work", "coordinator": "c:1"}
    values["certificates"] = {"authority": "ca.crt", "key": "a.key"}
    (tmp_path / "site.yml").write_text(yaml.safe_dump(values))
    known = list(read_log(log))[-1]["hash"]

    status, output = audit(tmp_path / "site.yml")

    assert status == 0
    assert "6 lines, the chain is intact" in output
    assert audit(tmp_path / "site.yml", "--known", known)[0] == 0
    log.write_bytes(log.read_bytes().replace(b"loss", b"lass"))
    assert audit(tmp_path / "site.yml")[0] == os.EX_CONFIG


@pytest.mark.parametrize("arguments", [["site.yml", "--known", "0"], ["site.yml", "--check", "--audit"]])
def test_known_needs_audit_and_audit_excludes_check(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)

    assert "--audit" in capsys.readouterr().err
