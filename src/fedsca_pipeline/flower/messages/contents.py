"""What a message holds, as the audit log tells it, and whether an answer may leave a site at all.

Without torch: the site's command, which sends, is not its worker, which makes the answer.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from fedsca_pipeline.errors import MessageError
from fedsca_pipeline.federation.messages.manifest import METRICS, outline
from fedsca_pipeline.flower.config import SITE_PATTERN
from fedsca_pipeline.flower.messages import documents

_ANSWERS = ("update", "report")
_FORMS = {"run": documents.RUN_PATTERN, "base_hash": documents.RUN_PATTERN, "site": SITE_PATTERN}
_DTYPES = frozenset({"F32", "F16", "I8"})
_LONGEST = 2**20  # bytes of a line: room for the names of ten thousand tensors


def question_content(kind: str, payload: bytes, most: int) -> dict[str, Any]:
    """Return what a message to a site holds: of a round, manifest and tensors; of a document, the keys.

    What cannot be read is said to be ``unreadable``, with the reason.
    """
    try:
        return _round_content(payload, most) if kind == "round" else _keys(payload)
    except (MessageError, ValueError) as error:
        return {"run": None, "unreadable": str(error)}


def answer_content(kind: str, payload: bytes, most: int) -> dict[str, Any]:
    """Return what a message from a site holds: of a round, manifest and tensors; a document whole.

    Raises:
        MessageError: it is nothing that may leave a site: another document, other metrics, other dtypes.
    """
    if kind in documents.ANSWERS:
        document = documents.read(documents.ANSWERS[kind], payload)
        return {"run": getattr(document, "run", None), "document": document.model_dump()}
    if kind != "round":
        raise MessageError(f"nothing of the kind {kind!r} leaves a site")
    content = _round_content(payload, most)
    manifest = content["manifest"]
    faults = [f"metric {name}" for name in sorted(manifest["metrics"].keys() - METRICS)]
    faults += [f"dtype {dtype}" for dtype in sorted(content["values"].keys() - _DTYPES)]
    # A manifest's other words are of fixed lists.
    faults += [f"a {key} of another form" for key, form in _FORMS.items() if not re.fullmatch(form, manifest[key])]
    if manifest["kind"] not in _ANSWERS:
        faults.append(f"a message of kind {manifest['kind']}")
    if faults:
        raise MessageError(f"no answer to a round: {', '.join(faults)}")
    return content


def check_tensors(answer: Mapping[str, Any], question: Mapping[str, Any]) -> None:
    """Do nothing where an answer holds no other tensors than what it answers, each in its shape.

    Args:
        answer: what ``answer_content`` says of it.
        question: what ``question_content`` says of the message to the site.

    Raises:
        MessageError: naming those that it may not hold.
    """
    shared = {name: shape for name, (_, shape) in question.get("tensors", {}).items()}
    held = {name: shape for name, (_, shape) in answer.get("tensors", {}).items()}
    if others := [f"{name} {shape}" for name, shape in held.items() if shared.get(name) != shape]:
        raise MessageError(f"tensors that the coordinator's message does not hold: {', '.join(others)}")


def _round_content(payload: bytes, most: int) -> dict[str, Any]:
    found = outline(payload, max_bytes=most)
    values: Counter[str] = Counter()
    for dtype, shape in found["tensors"].values():
        values[dtype] += math.prod(shape)
    if not all(map(math.isfinite, found["manifest"]["metrics"].values())):
        raise MessageError("a metric that is not finite")
    content = {"run": found["manifest"]["run"], **found, "values": dict(values)}
    if len(json.dumps(content)) > _LONGEST:
        raise MessageError(f"{len(found['tensors'])} tensors, whose names and shapes take more than {_LONGEST} bytes")
    return content


def _keys(payload: bytes) -> dict[str, Any]:
    if len(payload) > documents.MOST_BYTES:
        raise MessageError(f"a document of {len(payload)} bytes")
    value = from_json(payload)
    if not isinstance(value, dict):
        raise MessageError(f"a {type(value).__name__}, not an object")
    run = value.get("fingerprint", value.get("run"))
    return {"run": run if isinstance(run, str) else None, "keys": sorted(value)}
