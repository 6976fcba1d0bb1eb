"""What a site keeps for differential privacy, over all runs and for itself: a secret, and the ledger of its answers."""

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

    ``start`` stands for all that decided the answer, the site's secret included: the same start is the same answer.
    """

    run: str
    round: int
    start: str
    steps: int
    rate: float
    noise: float


@dataclass(frozen=True)
class Vault:
    """One folder a site, which outlives every run.

    ``bound``: what the site's owner allows over all runs; None: no more than each run's own.
    """

    folder: Path
    bound: PrivacyBound | None = None

    def entries(self) -> tuple[Entry, ...]:
        """Return what the site has answered, oldest first.

        Raises:
            SiteError: the ledger is damaged.
        """
        path = self.folder / LEDGER
        if not path.is_file():
            return ()
        try:
            return _ENTRIES.validate_python(read_json(path))
        except (ValueError, ValidationError) as error:
            raise SiteError(
                f"{path.name}: the site's ledger cannot be read ({type(error).__name__}); nobody knows what has been "
                "given away, so restore it from a copy"
            ) from error

    def record(self, entry: Entry) -> None:
        """Write an answer down before it is worked out; one that is there already is not written again."""
        entries = self.entries()
        if (after := with_entry(entries, entry)) != entries:
            self._open()
            write_json(self.folder / LEDGER, [asdict(one) for one in after])

    def keyed(self, start: str) -> str:
        """Return 64 hex digits that stand for ``start`` and the site's secret: an answer with another one counts anew.

        Raises:
            SiteError: the secret is damaged.
        """
        return self._digest(start, "ledger").hex()

    def draws(self, start: str, purpose: str) -> np.random.Generator:
        """Return a stream of randomness that nobody knows who does not have the site's secret; the same for the same.

        Raises:
            SiteError: the secret is damaged.
        """
        # torch's CPU generator keeps 32 bits of a seed, which anyone could try one after the other.
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self._digest(start, purpose)[:16], "big")))

    def _digest(self, start: str, purpose: str) -> bytes:
        self._open()
        try:
            secret = read_or_create_secret(self.folder / KEY)
        except ValueError as error:
            # The coordinator hears it, and has no business with the site's folders.
            raise SiteError(
                f"{KEY}: the site's secret is damaged; restore it from a copy, or delete it: with another one the "
                "rounds to come are other ones, and one that is answered again counts anew"
            ) from error
        return hmac.new(secret, f"{purpose}\0{start}".encode(), hashlib.sha256).digest()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)


def with_entry(entries: Sequence[Entry], entry: Entry) -> tuple[Entry, ...]:
    """Return the entries with one more, unless it is among them."""
    return tuple(entries) if entry in entries else (*entries, entry)


_ENTRIES = TypeAdapter(tuple[Entry, ...])
