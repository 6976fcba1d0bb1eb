"""The relay in Flower's environment with a fake grid: a bad answer of one site does not affect the other sites."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

RELAY_WITH_FAKE_GRID = """
import json
from types import SimpleNamespace as Fake
from flwr.app import ConfigRecord, RecordDict
from fedsca_pipeline.flower.coordinator import relay

def reply(number, payload=b"", error=None):
    content = RecordDict({"answer": ConfigRecord({"payload": payload})})
    metadata = Fake(reply_to_message_id=str(number), src_node_id=number)
    return Fake(metadata=metadata, content=content, error=error, has_error=lambda: error is not None)

replies = [reply(1, b"ok"), reply(2, bytes(11)), reply(3, error=Fake(reason="x" * 2**21, code=1)), reply(4, b"fine")]
grid = Fake(pull_messages=lambda ids: replies)
header, payload = relay._pull(grid, {"ids": ["1", "2", "3", "4"], "most": 10}, b"")
print(json.dumps([header["replies"], payload.decode()]))
"""


def test_an_answer_too_large_or_an_error_too_long_affects_only_its_site(project: Path) -> None:
    python = Path(os.environ.get("FEDSCA_ENGINE", project / ".flower-venv" / "bin")) / "python"
    if not python.is_file():
        pytest.skip("needs 'make engine' (or FEDSCA_ENGINE, the folder of flwr)")
    environment = {**os.environ, "PYTHONPATH": str(project / "src")}

    done = subprocess.run(
        [python, "-c", RELAY_WITH_FAKE_GRID], env=environment, capture_output=True, text=True, check=True
    )

    (first, large, failed, last), payload = json.loads(done.stdout)
    assert payload == "okfine"
    assert (first["bytes"], last["bytes"]) == (2, 4)
    assert large["bytes"] == 0
    assert "11 bytes, more than the 10 of flower.max_message" in large["answer"]["failed"]
    assert failed["error"] == "x" * 2_000
