"""Salted-hash names for imported images and subjects, and the private table of what the names stand for."""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
from pathlib import Path

from fedsca_pipeline.errors import DataError
from fedsca_pipeline.files import as_cell, read_or_create_secret, write_bytes

SALT, NAMES = "salt", "names.csv"


class Pseudonyms:
    """The names of one site: 16 hex digits of HMAC-SHA256 under the site's salt, the same as long as the salt is.

    ``folder`` is the site's private folder, readable by its owner alone. It holds the salt, drawn if missing, and the
    table ``names.csv``.

    Raises:
        DataError: the salt is damaged, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table: dict[str, str] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._salt = read_or_create_secret(folder / SALT)
        except ValueError as error:
            raise DataError(f"{error}; a new salt changes every name and subject of the site") from None
        except OSError as error:
            raise self._unwritable(error) from None

    def image(self, stem: str, file: str) -> str:
        """Return an image's name, and list the source file that it stands for."""
        name = self._digest("image", stem)
        self._table[name] = file
        return name

    def subject(self, subject: str) -> str:
        """Return a subject's name."""
        return self._digest("subject", subject)

    def write_table(self) -> None:
        """Write ``names.csv``: each image's name, and its first file relative to the source, see ``files.as_cell``.

        Raises:
            DataError: the private folder cannot be written.
        """
        stream = io.StringIO()
        csv.writer(stream).writerows(
            [("name", "file"), *((name, as_cell(file)) for name, file in sorted(self._table.items()))]
        )
        try:
            write_bytes(self._folder / NAMES, stream.getvalue().encode(errors="surrogateescape"), mode=0o600)
        except OSError as error:
            raise self._unwritable(error) from None

    def _digest(self, kind: str, text: str) -> str:
        message = f"{kind}\0{text}".encode(errors="surrogateescape")
        return hmac.new(self._salt, message, hashlib.sha256).hexdigest()[:16]

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self._folder}: the private table of names cannot be written ({error.strerror}); make room there, or let "
            "this user write there"
        )
