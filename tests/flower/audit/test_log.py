"""An audit log reveals every change, survives crashes and full disks, and misses no message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsca_pipeline.errors import AuditError
from fedsca_pipeline.flower.audit.log import NO_HASH, TORN_LINE, AuditLog, Chain, read_log

RECORDS = [{"kind": "round", "round": number, "site": "ä", "text": "a\nb"} for number in range(1, 6)]


def chained(records=RECORDS) -> list[bytes]:
    chain = Chain()
    lines = []
    for record in records:
        lines.append(chain.next_line(record))
        chain.advance(lines[-1])
    return lines


LINES = chained()


def first_broken(lines: list[bytes]) -> int | None:
    """Return the number of the first line that breaks the chain, or None."""
    chain = Chain()
    for line in b"".join(lines).splitlines(keepends=True):
        try:
            chain.advance(line)
        except AuditError:
            return chain.number + 1
    return None


def add(log: AuditLog, sent: bytes = b"abc", **content: object) -> int:
    return log.add("out", site="a", kind="open", round_=0, sent=sent, content={"run": None, **content})


def test_an_unchanged_log_is_intact() -> None:
    assert first_broken(LINES) is None


@given(st.data())
def test_a_changed_byte_is_found_at_its_line(data) -> None:
    number = data.draw(st.integers(0, len(LINES) - 1))
    position = data.draw(st.integers(0, len(LINES[number]) - 1))
    old = LINES[number][position]
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != old))
    changed = LINES[number][:position] + bytes([new]) + LINES[number][position + 1 :]

    assert first_broken([*LINES[:number], changed, *LINES[number + 1 :]]) == number + 1


@given(st.permutations(range(len(LINES))), st.integers(1, len(LINES)))
def test_removed_repeated_or_moved_lines_are_found(order, length) -> None:
    chosen = order[:length]

    found = first_broken([LINES[number] for number in chosen])

    in_order = chosen == list(range(length))
    assert (found is None) == in_order
    if not in_order:
        assert found == next(position for position, number in enumerate(chosen) if number != position) + 1


@given(st.integers(0, len(LINES) - 1), st.integers(0, len(LINES)))
def test_a_line_inserted_a_second_time_is_found(number, position) -> None:
    assert first_broken([*LINES[:position], LINES[number], *LINES[position:]]) is not None


def test_a_forged_line_with_a_valid_hash_breaks_the_next_line(tmp_path: Path) -> None:
    forged = chained([*RECORDS[:2], {**RECORDS[2], "round": 9}])[2]

    assert first_broken([*LINES[:2], forged, *LINES[3:]]) == 4


def test_the_hashes_are_computed_as_the_privacy_page_describes(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as log:
        add(log)
        add(log)

    previous = NO_HASH
    for line in (tmp_path / "audit.jsonl").read_text().splitlines():
        record = json.loads(line)
        text, _, _ = line.rpartition(', "hash": ')
        assert record["hash"] == sha256((text + "}").encode()).hexdigest()
        assert record["previous"] == previous
        previous = record["hash"]


def test_a_line_records_content_and_time_and_a_restart_continues_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "work" / "audit.jsonl"
    with AuditLog(path) as log:
        assert add(log, b"abc", document={"train": 3}) == 1
    with AuditLog(path) as log:
        assert add(log) == 2

    first, second = read_log(path)
    assert (first["bytes"], first["sha256"]) == (3, sha256(b"abc").hexdigest())
    assert first["document"] == {"train": 3}
    assert first["time"].endswith("+00:00")
    assert second["previous"] == first["hash"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("torn", "size"), [(b'{"number": 2, "ti', "17 bytes"), (b"{", "1 byte")])
def test_a_half_written_last_line_is_replaced_with_a_line_that_records_it(
    tmp_path: Path, caplog, torn: bytes, size: str
) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        add(log)
    with path.open("ab") as file:
        file.write(torn)
    with pytest.raises(AuditError, match=rf"line 2 is half-written \({size}\)"):
        list(read_log(path))

    with AuditLog(path) as log:
        assert add(log) == 3

    assert f"removed a half-written last line of {size}" in caplog.text
    _, replaced, _ = read_log(path)
    assert (replaced["kind"], replaced["direction"]) == (TORN_LINE, "none")
    assert (replaced["bytes"], replaced["sha256"]) == (len(torn), sha256(torn).hexdigest())


def test_a_broken_log_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join([LINES[0], LINES[2]]))

    with pytest.raises(AuditError, match="line 2 does not follow"):
        AuditLog(path)
    assert path.read_bytes() == LINES[0] + LINES[2]


def test_only_one_command_at_a_time_opens_a_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path), pytest.raises(AuditError, match="another command"):
        AuditLog(path)

    with AuditLog(path) as log:
        assert add(log) == 1


@pytest.mark.parametrize("change", ["append", "truncate", "remove", "replace"])
def test_a_foreign_change_of_the_open_file_stops_the_next_line(tmp_path: Path, change) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        add(log)
        if change == "append":
            path.open("ab").write(b"more\n")
        elif change == "truncate":
            os.truncate(path, 0)
        else:
            content = path.read_bytes()
            path.unlink()
            if change == "replace":
                path.write_bytes(content)

        with pytest.raises(AuditError):
            add(log)


@pytest.mark.parametrize("case", ["the path is a folder", "the parent is a file"])
def test_a_log_that_cannot_be_written_is_refused_with_its_path(tmp_path: Path, case) -> None:
    path = tmp_path / "file" / "audit.jsonl" if case == "the parent is a file" else tmp_path
    (tmp_path / "file").touch()

    with pytest.raises(AuditError, match="cannot be written"):
        AuditLog(path)


def test_a_closed_log_accepts_no_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.close()

    with pytest.raises(AuditError, match="closed"):
        add(log)


# Writes lines until it is killed, and prints the number of each after it is written.
WRITER = """
import sys
from pathlib import Path
from fedsca_pipeline.flower.audit.log import AuditLog

log = AuditLog(Path(sys.argv[1]))
while True:
    content = {"run": None, "pad": "x" * 20000}
    print(log.add("out", site="a", kind="open", round_=0, sent=b"", content=content), flush=True)
"""


def test_after_a_kill_at_any_moment_the_log_has_every_line_that_was_reported_as_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    reported = 0
    for lines in (1, 5, 9):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines):
                reported = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split()
            reported = int(rest[-1]) if rest else reported
        with AuditLog(path):
            pass
        assert len(list(read_log(path))) >= reported
