"""Errors meant for the user: each names the file, site or parameter at fault and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class FedscaError(Exception):
    """Base of every error this project raises on purpose.

    The command line prints its message without a traceback and exits with status 1.
    """


class ConfigError(FedscaError):
    """A parameter is missing, unknown, out of range or at odds with another one."""


class DataError(FedscaError):
    """A site's raw data, manifest or cached arrays cannot be used."""


class RefusedImportError(DataError):
    """Files of a source are broken, and none of it was imported.

    ``found`` has per site ``broken``, a list of ``file``, ``reason`` and ``cure``.
    """

    def __init__(self, message: str, found: Mapping[str, Any]) -> None:
        # Both, so that the error can be pickled on its way from a runner's process.
        super().__init__(message, found)
        self.found = {site: {"broken": entries["broken"]} for site, entries in found.items()}

    def __str__(self) -> str:
        return str(self.args[0])


class WeightsError(FedscaError):
    """Foundation or site-model weights are missing, corrupt or of another architecture."""


class ResumeError(FedscaError):
    """A checkpoint cannot be continued with the present configuration, data or code."""


class TrackingError(FedscaError):
    """MLflow cannot be reached or written to."""


class MessageError(FedscaError):
    """A message from the wire breaks its contract: names, shapes, dtype, base hash, round or site."""


class AuditError(FedscaError):
    """An audit log cannot be written, or is not as it was written; without its line no message is sent."""


class UnwritableAuditError(AuditError):
    """An audit log cannot be written now: a full disk, or a folder that is not mounted or closed to this user."""


class UnavailableError(FedscaError):
    """What a command needs is not there now, and may come back without anybody changing a file."""


class SiteError(FedscaError):
    """A site could not do its local work this round; the federation counts it as absent."""


class NoValidSite(FedscaError):  # noqa: N818  (what happened, in the method's own words)
    """A round got no usable reply from any site (or fewer than its quorum); nothing was overwritten."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown ``word``: the nearest known one, if any is near, and all of them.

    >>> suggestion("fedsac", ["fedavg", "fedsca"])
    "; did you mean 'fedsca'? Allowed: fedavg, fedsca"
    >>> suggestion("x", [])
    '. Allowed: none'
    """
    names = list(known)
    near = get_close_matches(word, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{hint} Allowed: {', '.join(names) or 'none'}"


def faults_by_key(error: ValidationError, group: str = "") -> list[str]:
    """Return one line per fault of a pydantic error: ``key: what is wrong (given: value)``, keys below ``group``.

    The value is left out where it is a whole group, or missing.
    """
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in (group, *fault["loc"]) if part != "") or "document"
        said = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        show = fault["type"] != "missing" and not isinstance(given, Mapping)
        lines.append(f"{key}: {said}" + (f" (given: {given!r})" if show else ""))
    return lines


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, which takes an s unless the number is 1.

    >>> counted(1, "image"), counted(0, "image")
    ('1 image', '0 images')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
