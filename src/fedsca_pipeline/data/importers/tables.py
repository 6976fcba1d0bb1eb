"""Tables and lists of a data set. No name in them may lead out of the source."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from fedsca_pipeline.data.readers.common import BrokenSampleError, check_not_empty
from fedsca_pipeline.errors import DataError

TAKE_THE_TABLE = "take the table that came with the images"

_MACOS = "__MACOSX"


def visible_files(source: Path, pattern: str = "*") -> list[Path]:
    """Return the files below ``source`` whose names match a glob pattern, sorted.

    Hidden files, and files that macOS adds to archives, are skipped.
    """
    return [
        path
        for path in sorted(source.rglob(pattern))
        if not any(part.startswith(".") or part == _MACOS for part in path.relative_to(source).parts) and path.is_file()
    ]


def find_file(source: Path, pattern: str) -> Path:
    """Return the one file below ``source`` whose name matches a glob pattern.

    Raises:
        DataError: there is none, or several, or it is a link out of the source.
    """
    found = visible_files(source, pattern)
    if len(found) != 1:
        names = ", ".join(path.relative_to(source).as_posix() for path in found[:3])
        raise DataError(
            f"{source}: {f'{len(found)} files {pattern} ({names})' if found else f'no file {pattern}'}; "
            "unpack the whole data set into its own folder"
        )
    check_inside(source, found[0])
    return found[0]


def check_inside(source: Path, file: Path) -> None:
    """Check that a file lies in the source, and if it is there, that it is no pointer (``check_not_empty``).

    Raises:
        DataError: it is a link out of the source, empty, or a pointer.
    """
    if not file.resolve().is_relative_to(source.resolve()):
        raise DataError(f"{file}: a link that leads out of the source; copy the file itself there")
    if file.is_file():
        try:
            check_not_empty(file)
        except BrokenSampleError as error:
            raise DataError(f"{file}: {error}") from error


def listed_file(table: Path, name: str) -> Path:
    """Return the path of a file that a list names relative to its folder; the file may be missing.

    Raises:
        DataError: the name is absolute, or goes up.
    """
    if PureWindowsPath(name).is_absolute() or PureWindowsPath(name).drive or name.startswith(("/", "\\")):
        raise DataError(f"{table}: names {name!r}, an absolute path; only files below it are read")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise DataError(f"{table}: names {name!r}, which leads out of its folder; only files below it are read")
    return table.parent / PurePosixPath(name)


def read_table(path: Path, key: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the rows of a CSV, or TSV, with a header, by their value of ``key``; text in NFC without outer blanks.

    Missing cells of a short row are empty text.

    Raises:
        DataError: the file is no readable CSV, a column is missing, or a key occurs twice.
    """
    try:
        # utf-8-sig: spreadsheets start their files with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            head = [name.strip() for name in rows.fieldnames or ()]
            if missing := [column for column in (key, *columns) if column not in head]:
                raise DataError(f"{path}: no column {missing[0]!r}; there are {', '.join(head) or 'none'}")
            rows.fieldnames = head
            table: dict[str, dict[str, str]] = {}
            for number, row in enumerate(rows, start=2):
                values = {name: unicodedata.normalize("NFC", row[name] or "").strip() for name in (key, *columns)}
                if values[key] in table:
                    raise DataError(f"{path}: row {number}: {key} {values[key]!r} occurs twice; keep one row")
                table[values[key]] = values
            return table
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable CSV ({' '.join(str(error).split())})") from error
