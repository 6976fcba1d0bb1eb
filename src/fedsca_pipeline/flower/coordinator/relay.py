"""The ServerApp: a thin relay between the coordinator's round loop, in its own process, and Flower's grid.

It decides nothing and reads no payload. The coordinator asks, one frame after the other: ``nodes``, ``push``, ``pull``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsca_pipeline.flower.messages import frames

app = ServerApp()

_Frame = tuple[dict[str, Any], bytes]


@app.main()
def relay(grid: Grid, context: Context) -> None:
    """Answer the coordinator at the socket that the run's configuration names, until it hangs up."""
    most = int(context.run_config["most"])
    with frames.connect(str(context.run_config["socket"])) as line:
        frames.send(line, {"run": str(context.run_id)})
        while True:
            try:
                header, payload = frames.receive(line, most)
            except EOFError:
                return
            frames.send(line, *_ANSWERS[header["ask"]](grid, header, payload))


def _nodes(grid: Grid, _header: Mapping[str, Any], _payload: bytes) -> _Frame:
    nodes = [[node.name, str(node.node_id), node.last_activated_at] for node in grid.get_nodes()]
    return {"nodes": nodes}, b""


def _push(grid: Grid, header: Mapping[str, Any], payload: bytes) -> _Frame:
    content = RecordDict({"task": ConfigRecord({**header["task"], "payload": payload})})
    message = Message(
        content,
        dst_node_id=int(header["node"]),
        message_type="train",
        ttl=float(header["ttl"]),
        group_id=str(header["task"]["round"]),
    )
    pushed = list(grid.push_messages([message]))
    return {"id": pushed[0] if pushed else None}, b""


def _pull(grid: Grid, header: Mapping[str, Any], _payload: bytes) -> _Frame:
    # What one site sends must not make the frame larger than the coordinator takes: that would end every site's round.
    found, parts = [], []
    for reply in grid.pull_messages(header["ids"]):
        entry: dict[str, Any] = {"id": reply.metadata.reply_to_message_id, "node": str(reply.metadata.src_node_id)}
        if reply.has_error():
            entry |= {
                "error": str(reply.error.reason or f"code {reply.error.code}")[: frames.LONGEST_REASON],
                "bytes": 0,
            }
        else:
            said, payload = _answer(reply.content, header["most"])
            parts.append(payload)
            entry |= {"answer": said, "bytes": len(payload)}
        found.append(entry)
    return {"replies": found}, b"".join(parts)


def _answer(content: RecordDict, most: int) -> _Frame:
    """Return an honest site's answer: one record of a payload, and of ``failed`` where there is a reason for none."""
    record = content["answer"] if list(content) == ["answer"] else None
    if not isinstance(record, ConfigRecord) or not record.keys() <= {"payload", "failed"}:
        return {"failed": "an answer with other records than the one that is expected"}, b""
    payload, failed = record.get("payload"), record.get("failed")
    if not isinstance(payload, bytes):
        return {"failed": "an answer without a payload of bytes"}, b""
    if len(payload) > most:
        return {"failed": f"an answer of {len(payload)} bytes, more than the {most} of flower.max_message"}, b""
    return ({} if failed is None else {"failed": str(failed)[: frames.LONGEST_REASON]}), payload


_ANSWERS: Mapping[str, Callable[[Grid, Mapping[str, Any], bytes], _Frame]] = MappingProxyType(
    {"nodes": _nodes, "push": _push, "pull": _pull}
)
