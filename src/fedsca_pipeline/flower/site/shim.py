"""The ClientApp: hands a task over to the long-lived site worker and carries its answer back.

Flower starts a process for every message, so nothing heavy is imported here. A SuperNode waits for its ClientApp
without end, so this one has an alarm of its own.
"""

from __future__ import annotations

import os
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import SITE_SOCKET

app = ClientApp()

# The site's command ends a task that takes too long; this much later the shim gives the command itself up.
_GRACE_SECONDS = 30.0


@app.train()
def work(message: Message, _context: Context) -> Message:
    """Answer one task: what the site's command says of it, or why it could not be asked."""
    task = dict(message.content.config_records["task"])
    payload = task.pop("payload")
    try:
        header, answer = ask_site(task, payload if isinstance(payload, bytes) else b"")
    except (OSError, EOFError, frames.FrameError) as error:
        header, answer = {"failed": f"the site's worker cannot be reached ({error!r})"}, b""
    record = ConfigRecord({**{key: str(value) for key, value in header.items()}, "payload": answer})
    return Message(RecordDict({"answer": record}), reply_to=message)


def ask_site(task: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the frame with which the site's command answers a task.

    Raises:
        OSError: nobody listens, or the answer takes longer than the task allows.
        EOFError: the command ended meanwhile.
        FrameError: the answer is too large.
    """
    with frames.connect(os.environ[SITE_SOCKET], float(task["seconds"]) + _GRACE_SECONDS) as line:
        frames.send(line, task, payload)
        return frames.receive(line, 1 << 31)
