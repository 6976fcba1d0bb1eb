"""Describe a message for the audit log, and check that an answer may leave a site.

Works without torch, because the command of a site checks what its worker, another process, answers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from fedsca_pipeline.errors import MessageError, counted
from fedsca_pipeline.federation.messages.manifest import METRICS, outline
from fedsca_pipeline.flower.config import SITE_PATTERN
from fedsca_pipeline.flower.messages import documents

_ANSWERS = ("update", "report")
_PATTERNS = {"run": documents.RUN_PATTERN, "base_hash": documents.RUN_PATTERN, "site": SITE_PATTERN}
_DTYPES = frozenset({"F32", "F16", "I8"})
_MAX_LINE = 2**20  # bytes; enough for the names of ten thousand tensors


def request_content(kind: str, payload: bytes, most: int) -> dict[str, Any]:
    """Return the content of a message to a site: manifest and tensors of a round, or the keys of a document.

    For a message that cannot be read, ``unreadable`` holds the reason.
    """
    try:
        return _round_content(payload, most) if kind == "round" else _keys(payload)
    except (MessageError, ValueError) as error:
        return {"run": None, "unreadable": str(error)}


def answer_content(kind: str, payload: bytes, most: int) -> dict[str, Any]:
    """Return the content of a message from a site: manifest and tensors of a round, or the whole document.

    Raises:
        MessageError: the message may not leave a site, such as another document, another metric or another dtype.
    """
    if kind in documents.ANSWERS:
        document = documents.read(documents.ANSWERS[kind], payload)
        return {"run": getattr(document, "run", None), "document": document.model_dump()}
    if kind != "round":
        raise MessageError(f"a message of the kind {kind!r} may not leave a site")
    content = _round_content(payload, most)
    manifest = content["manifest"]
    faults = [f"metric {name}" for name in sorted(manifest["metrics"].keys() - METRICS)]
    faults += [f"dtype {dtype}" for dtype in sorted(content["values"].keys() - _DTYPES)]
    # The other texts of a manifest come from fixed lists.
    faults += [f"{key} has an invalid form" for key, form in _PATTERNS.items() if not re.fullmatch(form, manifest[key])]
    if manifest["kind"] not in _ANSWERS:
        faults.append(f"a message of kind {manifest['kind']}")
    if faults:
        raise MessageError(f"not an answer to a round: {', '.join(faults)}")
    return content


def check_tensors(answer: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Check that an answer holds only tensors of the request, in the same shapes.

    Args:
        answer: content of the answer, from ``answer_content``.
        request: content of the message to the site, from ``request_content``.

    Raises:
        MessageError: the answer holds other tensors; the message names them.
    """
    shared = {name: shape for name, (_, shape) in request.get("tensors", {}).items()}
    answered = {name: shape for name, (_, shape) in answer.get("tensors", {}).items()}
    if others := [f"{name} {shape}" for name, shape in answered.items() if shared.get(name) != shape]:
        raise MessageError(f"tensors that the message of the coordinator does not hold: {', '.join(others)}")


def _round_content(payload: bytes, most: int) -> dict[str, Any]:
    found = outline(payload, max_bytes=most)
    values: Counter[str] = Counter()
    for dtype, shape in found["tensors"].values():
        values[dtype] += math.prod(shape)
    if not all(map(math.isfinite, found["manifest"]["metrics"].values())):
        raise MessageError("a metric is not finite")
    content = {"run": found["manifest"]["run"], **found, "values": dict(values)}
    if len(json.dumps(content)) > _MAX_LINE:
        raise MessageError(
            f"names and shapes of {counted(len(found['tensors']), 'tensor')} take more than {_MAX_LINE} bytes"
        )
    return content


def _keys(payload: bytes) -> dict[str, Any]:
    if len(payload) > documents.MAX_BYTES:
        raise MessageError(f"a document of {len(payload)} bytes is larger than the {documents.MAX_BYTES} allowed")
    value = from_json(payload)
    if not isinstance(value, dict):
        raise MessageError(f"a document is a {type(value).__name__}, not an object")
    run = value.get("fingerprint", value.get("run"))
    return {"run": run if isinstance(run, str) else None, "keys": sorted(value)}
