"""Check an audit log and print it as a table of messages by run, round and kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsca_pipeline.errors import AuditError, counted
from fedsca_pipeline.flower.audit.log import NO_HASH, TORN_LINE, read_log


@dataclass
class Traffic:
    """Messages of one kind in one round of a run: counts, bytes, and descriptions of those that left."""

    came: int = 0
    bytes_in: int = 0
    left: int = 0
    bytes_out: int = 0
    refused: int = 0
    contents: list[str] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count the message of one line."""
        if record["direction"] == "in":
            self.came, self.bytes_in = self.came + 1, self.bytes_in + record["bytes"]
            return
        self.left, self.bytes_out = self.left + 1, self.bytes_out + record["bytes"]
        self.refused += "refused" in record
        content = describe(record)
        if content not in self.contents:
            self.contents.append(content)


Key = tuple[str, int, str]
"""Run (empty if a message belongs to none), round, kind of message."""


def show_audit(path: Path, known: Sequence[str] = ()) -> None:
    """Check the chain of a log and print its messages as a table.

    Args:
        path: path of the log.
        known: hashes of lines that the log must contain.

    Raises:
        AuditError: the file cannot be read, a line is broken (the message names the first), or a known hash is missing.
    """
    try:
        records = list(read_log(path))
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})") from error
    if missing := set(known) - {record["hash"] for record in records}:
        raise AuditError(
            f"{path}: no line has the hash {min(missing)}; lines are missing at the end, or this is another log"
        )
    console = Console()
    console.print(render_audit(traffic_of(records)))
    torn = sum(record["kind"] == TORN_LINE for record in records)
    last = records[-1]["hash"] if records else NO_HASH
    lines = f"{counted(len(records), 'line')}, the chain is intact; half-written lines replaced after a crash: {torn}."
    console.print(f"{path}: {lines}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Hash of the last line: {last}", highlight=False, soft_wrap=True)


def traffic_of(records: Iterable[Mapping[str, Any]]) -> dict[Key, Traffic]:
    """Return the messages by run, round and kind, in the order of the first message of each.

    An answer is counted with the message that it answers, because a refusal does not name its run.
    """
    keys: dict[int, Key] = {}
    found: dict[Key, Traffic] = {}
    for record in records:
        if record["direction"] == "none":
            continue
        own = (record["run"] or "", record["round"], record["kind"])
        keys[record["number"]] = key = keys.get(record["answer_to"], own)
        found.setdefault(key, Traffic()).add(record)
    return found


def render_audit(traffic: Mapping[Key, Traffic]) -> Table:
    """Return the table, for terminals of at least 80 columns. Without messages it has headings only."""
    view = Table(title="Messages", title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False)
    view.add_column("run", no_wrap=True)
    view.add_column("round", justify="right", no_wrap=True)
    view.add_column("message", no_wrap=True)
    for heading in ("came", "bytes", "left", "bytes"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("what left", overflow="fold")
    for (run, round_, kind), row in traffic.items():
        counts = (row.came, row.bytes_in, row.left, row.bytes_out)
        contents = Text("\n").join(map(_printable, row.contents))
        view.add_row(_printable(run[:8] or "–"), str(round_), kind, *(f"{count:,}" for count in counts), contents)
    return view


def _printable(untrusted: str) -> Text:
    """Return text from a message as it is, without markup or characters that move the cursor."""
    return Text("".join(letter if letter.isprintable() else "�" for letter in untrusted))


def describe(record: Mapping[str, Any]) -> str:
    """Return a short description of the content of a message."""
    if "refused" in record:
        return f"refused: {record['refused']}"
    if "unreadable" in record:
        return f"unreadable: {record['unreadable']}"
    if "manifest" not in record:
        return ", ".join(record.get("document", record.get("keys", ())))
    values = [f"{count:,} {dtype}" for dtype, count in record["values"].items()]
    tensors = f"{counted(len(record['tensors']), 'tensor')} ({', '.join(values)})" if values else "no tensor"
    return ", ".join([tensors, "samples", *sorted(record["manifest"]["metrics"])])
