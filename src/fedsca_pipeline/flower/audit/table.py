"""The audit log, checked and drawn: what came and left, by run, round and kind of message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsca_pipeline.errors import AuditError
from fedsca_pipeline.flower.audit.log import NO_HASH, TORN_LINE, read_log


@dataclass
class Traffic:
    """The messages of one kind in one round of a run: how many, their bytes, and what those that left held."""

    came: int = 0
    bytes_in: int = 0
    left: int = 0
    bytes_out: int = 0
    refused: int = 0
    held: list[str] = field(default_factory=list)

    def add(self, record: Mapping[str, Any]) -> None:
        """Count one more line."""
        if record["direction"] == "in":
            self.came, self.bytes_in = self.came + 1, self.bytes_in + record["bytes"]
            return
        self.left, self.bytes_out = self.left + 1, self.bytes_out + record["bytes"]
        self.refused += "refused" in record
        held = told(record)
        if held not in self.held:
            self.held.append(held)


Key = tuple[str, int, str]
"""Run (empty where a message is of none), round, kind of message."""


def show_audit(path: Path, known: Sequence[str] = ()) -> None:
    """Print a log's table, once its chain is found whole.

    Args:
        path: of the log.
        known: hashes of lines, as an earlier look has shown them, that have to be there still.

    Raises:
        AuditError: the file cannot be read, a line is broken (the first one is named), or a known one is not there.
    """
    try:
        records = list(read_log(path))
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})") from error
    if missing := set(known) - {record["hash"] for record in records}:
        raise AuditError(f"{path}: no line has the hash {min(missing)}: the end was cut off, or the log is another one")
    console = Console()
    console.print(render_audit(traffic_of(records)))
    torn = sum(record["kind"] == TORN_LINE for record in records)
    last = records[-1]["hash"] if records else NO_HASH
    said = f"{path}: {len(records)} lines, the chain is whole; {torn} half-written ones were taken out after a crash."
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Hash of the last line: {last}", highlight=False, soft_wrap=True)


def traffic_of(records: Iterable[Mapping[str, Any]]) -> dict[Key, Traffic]:
    """Return what came and left by run, round and kind, in the order of the first message of each.

    An answer counts with the message that it answers: a refusal does not say of which run it is.
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
    """Draw the table for a terminal of 80 columns and more; no message: the headings alone."""
    view = Table(title="Messages", title_justify="left", box=box.SIMPLE, pad_edge=False, show_edge=False)
    view.add_column("run", no_wrap=True)
    view.add_column("round", justify="right", no_wrap=True)
    view.add_column("message", no_wrap=True)
    for heading in ("came", "bytes", "left", "bytes"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("what left", overflow="fold")
    for (run, round_, kind), row in traffic.items():
        counts = (row.came, row.bytes_in, row.left, row.bytes_out)
        held = Text("\n").join(map(_plain, row.held))
        view.add_row(_plain(run[:8] or "–"), str(round_), kind, *(f"{count:,}" for count in counts), held)
    return view


def _plain(words: str) -> Text:
    """Return words of whoever wrote a message as what they are: no markup, and nothing that moves the cursor."""
    return Text("".join(letter if letter.isprintable() else "�" for letter in words))


def told(record: Mapping[str, Any]) -> str:
    """Say in a few words what a message held."""
    if "refused" in record:
        return f"refused: {record['refused']}"
    if "unreadable" in record:
        return f"unreadable: {record['unreadable']}"
    if "manifest" not in record:
        return ", ".join(record.get("document", record.get("keys", ())))
    values = [f"{count:,} {dtype}" for dtype, count in record["values"].items()]
    tensors = f"{len(record['tensors'])} tensors ({', '.join(values)})" if values else "no tensor"
    return ", ".join([tensors, "samples", *sorted(record["manifest"]["metrics"])])
