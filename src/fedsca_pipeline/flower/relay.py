"""The ServerApp: a thin relay between the coordinator's round loop, in its own process, and Flower's grid.

It decides nothing and reads no payload. The coordinator asks, one frame after the other: ``nodes``, ``push``, ``pull``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsca_pipeline.flower import frames

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
    return {"nodes": [[node.name, str(node.node_id)] for node in grid.get_nodes()]}, b""


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
    found, parts = [], []
    for reply in grid.pull_messages(header["ids"]):
        entry: dict[str, Any] = {"id": reply.metadata.reply_to_message_id, "node": str(reply.metadata.src_node_id)}
        if reply.has_error():
            entry |= {"error": str(reply.error.reason or f"code {reply.error.code}"), "bytes": 0}
        else:
            answer = dict(reply.content.config_records.get("answer", ConfigRecord()))
            payload = answer.pop("payload", b"")
            parts.append(payload if isinstance(payload, bytes) else b"")
            entry |= {"answer": {key: str(value) for key, value in answer.items()}, "bytes": len(parts[-1])}
            entry["records"] = sorted(map(str, reply.content))
        found.append(entry)
    return {"replies": found}, b"".join(parts)


_ANSWERS: Mapping[str, Callable[[Grid, Mapping[str, Any], bytes], _Frame]] = MappingProxyType(
    {"nodes": _nodes, "push": _push, "pull": _pull}
)
