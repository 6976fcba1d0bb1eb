"""The ServerApp: relays messages between the coordinator, which is another process, and Flower's grid.

It makes no decisions and reads no payload. The coordinator sends one request per frame: ``nodes``, ``push``, ``pull``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedsca_pipeline.flower.messages import frames

app = ServerApp()

_Frame = tuple[dict[str, Any], bytes]

# Seconds that one reply, while its content arrives, may hold up the others.
_PATIENCE = 0.5
# More than there are replies that arrive at the same time.
_MOST_PULLS = 1_000
# Start of Flower's reason for a reply whose content did not arrive. Its code is also that of an unknown message.
_INCOMPLETE = "Reply message objects are unavailable"


class Replies:
    """The replies of the sites. One whose content arrives slowly, or never, holds up no other.

    A SuperNode announces a reply, then sends its content. ``Grid.pull_messages`` takes the announced replies from the
    SuperLink, which thereby forgets their messages, and returns when it has the content of all, or when three minutes
    have brought none. So each message is asked for on its own, in a thread, and not again until that thread is done.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._threads = ThreadPoolExecutor(_MOST_PULLS)
        self._pulls: dict[str, Future[Iterable[Message]]] = {}

    def pull(self, ids: Sequence[str]) -> list[Message]:
        """Return the replies to these messages that have arrived completely since the last call."""
        found: list[Message] = []
        for id_ in ids:
            if id_ not in self._pulls:
                self._pulls[id_] = self._threads.submit(self._grid.pull_messages, [id_])
                wait([self._pulls[id_]], _PATIENCE)
            if self._pulls[id_].done():
                found += self._pulls.pop(id_).result()
        return found


@app.main()
def relay(grid: Grid, context: Context) -> None:
    """Answer the coordinator through the socket named in the run configuration, until it disconnects."""
    most = int(context.run_config["most"])
    handlers: Mapping[str, Callable[[Mapping[str, Any], bytes], _Frame]] = {
        "nodes": partial(_nodes, grid),
        "push": partial(_push, grid),
        "pull": partial(_pull, Replies(grid)),
    }
    with frames.connect(str(context.run_config["socket"])) as connection:
        frames.send(connection, {"run": str(context.run_id)})
        while True:
            try:
                header, payload = frames.receive(connection, most)
            except EOFError:
                return
            frames.send(connection, *handlers[header["ask"]](header, payload))


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


def _pull(replies: Replies, header: Mapping[str, Any], _payload: bytes) -> _Frame:
    # One site must not make the frame larger than the coordinator accepts, since that would end the round of all sites.
    found, parts = [], []
    for reply in replies.pull(header["ids"]):
        entry: dict[str, Any] = {"id": reply.metadata.reply_to_message_id, "node": str(reply.metadata.src_node_id)}
        if reply.has_error():
            reason = str(reply.error.reason or f"code {reply.error.code}")
            if reason.startswith(_INCOMPLETE):
                reason = (
                    "its answer has not arrived completely; if the log of nginx says 'too large body', raise "
                    "client_max_body_size in nginx.conf"
                )
            entry |= {"error": reason[: frames.MAX_REASON], "bytes": 0}
        else:
            answer, payload = _checked_answer(reply.content, header["most"])
            parts.append(payload)
            entry |= {"answer": answer, "bytes": len(payload)}
        found.append(entry)
    return {"replies": found}, b"".join(parts)


def _checked_answer(content: RecordDict, most: int) -> _Frame:
    """Return a site's answer as header and payload; ``failed`` in the header says why there is no payload."""
    record = content["answer"] if list(content) == ["answer"] else None
    if not isinstance(record, ConfigRecord) or not record.keys() <= {"payload", "failed"}:
        return {"failed": "its answer has other records than expected"}, b""
    payload, failed = record.get("payload"), record.get("failed")
    if not isinstance(payload, bytes):
        return {"failed": "its answer has no payload of bytes"}, b""
    if len(payload) > most:
        return {"failed": f"its answer has {len(payload)} bytes, more than the {most} of flower.max_message"}, b""
    return ({} if failed is None else {"failed": str(failed)[: frames.MAX_REASON]}), payload
