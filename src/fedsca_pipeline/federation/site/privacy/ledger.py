"""A site's privacy ledger: over all runs, the answers it gave, and the secret that its noise is drawn from."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from fedsca_pipeline.config import PrivacyBound
from fedsca_pipeline.errors import SiteError
from fedsca_pipeline.files import read_json, read_or_create_secret, write_json

KEY, LEDGER = "privacy.key", "privacy_ledger.json"


@dataclass(frozen=True)
class Entry:
    """One answer: ``steps`` of the Gaussian mechanism with ``noise`` times the clip norm, on units drawn at ``rate``.

    ``start`` identifies everything that decided the answer, including the site's secret: equal starts, equal answers.
    """

    run: str
    round: int
    start: str
    steps: int
    rate: float
    noise: float


@dataclass(frozen=True)
class PrivacyLedger:
    """One folder per site, which stays when runs end.

    ``bound`` is the limit that the site's owner sets over all runs; None: only each run's own limits apply.
    """

    folder: Path
    bound: PrivacyBound | None = None

    def entries(self) -> tuple[Entry, ...]:
        """Return the site's answers, oldest first.

        Raises:
            SiteError: the ledger's file is damaged.
        """
        path = self.folder / LEDGER
        if not path.is_file():
            return ()
        try:
            return _ENTRIES.validate_python(read_json(path))
        except (ValueError, ValidationError) as error:
            raise SiteError(
                f"{path.name}: the site's privacy ledger cannot be read ({type(error).__name__}), so what the site has "
                "spent is unknown; restore the file from a copy"
            ) from error

    def record(self, entry: Entry) -> None:
        """Add an answer, before it is computed; one that is in the ledger is not added again."""
        entries = self.entries()
        if (after := with_entry(entries, entry)) != entries:
            self._open()
            write_json(self.folder / LEDGER, [asdict(one) for one in after])

    def keyed(self, start: str) -> str:
        """Return 64 hex digits over ``start`` and the site's secret: with another secret an answer counts again.

        Raises:
            SiteError: the secret is damaged.
        """
        return self._digest(start, "ledger").hex()

    def draws(self, start: str, purpose: str) -> np.random.Generator:
        """Return the random stream of ``start`` and ``purpose``, which only the site's secret reveals.

        Raises:
            SiteError: the secret is damaged.
        """
        # torch's CPU generator uses 32 bits of a seed, few enough to try them all.
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self._digest(start, purpose)[:16], "big")))

    def _digest(self, start: str, purpose: str) -> bytes:
        self._open()
        try:
            secret = read_or_create_secret(self.folder / KEY)
        except ValueError as error:
            # The coordinator receives this message, so it names no folder of the site.
            raise SiteError(
                f"{KEY}: the site's secret is damaged; restore it from a copy, or delete it: a new secret changes the "
                "rounds to come, and a round that is answered again counts again"
            ) from error
        return hmac.new(secret, f"{purpose}\0{start}".encode(), hashlib.sha256).digest()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)


def with_entry(entries: Sequence[Entry], entry: Entry) -> tuple[Entry, ...]:
    """Return the entries with ``entry`` at the end, unless it is among them."""
    return tuple(entries) if entry in entries else (*entries, entry)


_ENTRIES = TypeAdapter(tuple[Entry, ...])
