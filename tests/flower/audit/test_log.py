"""An audit log takes any change for what it is, outlives crashes and full disks, and lets nothing pass it by."""

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
        lines.append(chain.line(record))
        chain.follow(lines[-1])
    return lines


LINES = chained()


def first_broken(lines: list[bytes]) -> int | None:
    """The number of the first line that is not taken, or None."""
    chain = Chain()
    for line in b"".join(lines).splitlines(keepends=True):
        try:
            chain.follow(line)
        except AuditError:
            return chain.number + 1
    return None


def add(log: AuditLog, sent: bytes = b"abc", **content: object) -> int:
    return log.add("out", site="a", kind="open", round_=0, sent=sent, content={"run": None, **content})


def test_a_log_as_it_was_written_is_whole() -> None:
    assert first_broken(LINES) is None


@given(st.data())
def test_any_changed_byte_is_found_at_its_line(data) -> None:
    number = data.draw(st.integers(0, len(LINES) - 1))
    place = data.draw(st.integers(0, len(LINES[number]) - 1))
    old = LINES[number][place]
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != old))
    changed = LINES[number][:place] + bytes([new]) + LINES[number][place + 1 :]

    assert first_broken([*LINES[:number], changed, *LINES[number + 1 :]]) == number + 1


@given(st.permutations(range(len(LINES))), st.integers(1, len(LINES)))
def test_lines_removed_doubled_or_moved_are_found(order, length) -> None:
    kept = order[:length]

    found = first_broken([LINES[number] for number in kept])

    straight = kept == list(range(length))
    assert (found is None) == straight
    if not straight:
        assert found == next(place for place, number in enumerate(kept) if number != place) + 1


@given(st.integers(0, len(LINES) - 1), st.integers(0, len(LINES)))
def test_a_line_put_in_again_is_found(number, place) -> None:
    assert first_broken([*LINES[:place], LINES[number], *LINES[place:]]) is not None


def test_a_line_written_anew_with_a_hash_of_its_own_breaks_the_next(tmp_path: Path) -> None:
    forged = chained([*RECORDS[:2], {**RECORDS[2], "round": 9}])[2]

    assert first_broken([*LINES[:2], forged, *LINES[3:]]) == 4


def test_the_hashes_are_those_that_the_page_says_how_to_work_out(tmp_path: Path) -> None:
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


def test_a_line_says_what_was_sent_and_when_and_a_restart_goes_on_with_the_chain(tmp_path: Path) -> None:
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


def test_a_torn_last_line_is_taken_out_and_a_line_says_so(tmp_path: Path, caplog) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        add(log)
    torn = b'{"number": 2, "ti'
    with path.open("ab") as file:
        file.write(torn)
    with pytest.raises(AuditError, match="line 2 is half-written"):
        list(read_log(path))

    with AuditLog(path) as log:
        assert add(log) == 3

    assert "half-written" in caplog.text
    _, mended, _ = read_log(path)
    assert (mended["kind"], mended["direction"]) == (TORN_LINE, "none")
    assert (mended["bytes"], mended["sha256"]) == (len(torn), sha256(torn).hexdigest())


def test_a_broken_log_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join([LINES[0], LINES[2]]))

    with pytest.raises(AuditError, match="line 2 does not follow"):
        AuditLog(path)
    assert path.read_bytes() == LINES[0] + LINES[2]


def test_one_command_at_a_time_writes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path), pytest.raises(AuditError, match="another command"):
        AuditLog(path)

    with AuditLog(path) as log:
        assert add(log) == 1


@pytest.mark.parametrize("change", ["append", "truncate", "remove", "replace"])
def test_what_another_hand_did_to_the_open_file_stops_the_next_line(tmp_path: Path, change) -> None:
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


@pytest.mark.parametrize("there", ["a folder", "no folder"])
def test_a_log_that_cannot_be_written_is_refused_by_its_name(tmp_path: Path, there) -> None:
    path = tmp_path / "file" / "audit.jsonl" if there == "no folder" else tmp_path
    (tmp_path / "file").touch()

    with pytest.raises(AuditError, match="cannot be written"):
        AuditLog(path)


def test_a_closed_log_takes_nothing(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.close()

    with pytest.raises(AuditError, match="closed"):
        add(log)


# Writes lines, each told of once it is written, until it is killed.
WRITER = """
import sys
from pathlib import Path
from fedsca_pipeline.flower.audit.log import AuditLog

log = AuditLog(Path(sys.argv[1]))
while True:
    content = {"run": None, "pad": "x" * 20000}
    print(log.add("out", site="a", kind="open", round_=0, sent=b"", content=content), flush=True)
"""


def test_killed_at_any_moment_it_has_every_line_that_was_said_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    said = 0
    for lines in (1, 5, 9):
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(lines):
                said = int(process.stdout.readline())
            process.kill()
            rest = process.stdout.read().split()
            said = int(rest[-1]) if rest else said
        with AuditLog(path):
            pass
        assert len(list(read_log(path))) >= said
