"""The ClientApp: hands a task to the command of the site and returns its answer.

Flower starts a process for each message, so this module imports nothing heavy. A SuperNode waits for its ClientApp
without a time limit, so the shim sets one.
"""

from __future__ import annotations

import os
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import SITE_SOCKET

app = ClientApp()

# The command of the site ends a task that takes too long; if it does not answer this much later, the shim gives up.
_GRACE_SECONDS = 30.0


@app.train()
def work(message: Message, _context: Context) -> Message:
    """Return the answer of the site's command to a task, or the reason why the command cannot be reached."""
    task = dict(message.content.config_records["task"])
    payload = task.pop("payload")
    try:
        header, answer = ask_site(task, payload if isinstance(payload, bytes) else b"")
    except (OSError, EOFError, frames.FrameError) as error:
        header, answer = {"failed": f"the command of the site cannot be reached ({error!r})"}, b""
    record = ConfigRecord({**{key: str(value) for key, value in header.items()}, "payload": answer})
    return Message(RecordDict({"answer": record}), reply_to=message)


def ask_site(task: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the frame with which the command of the site answers a task.

    Raises:
        OSError: the command does not listen, or the answer takes longer than the task allows.
        EOFError: the command ended before it answered.
        FrameError: the answer is too large.
    """
    with frames.connect(os.environ[SITE_SOCKET], float(task["seconds"]) + _GRACE_SECONDS) as connection:
        frames.send(connection, task, payload)
        return frames.receive(connection, 1 << 31)
