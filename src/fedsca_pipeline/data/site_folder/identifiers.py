"""The door of raw data: DICOM files and sites that ask for hidden names are refused here; an import lets them in.

Every file and name below ``01_raw`` may appear in results. ``kedro run --pipeline=import_sites`` writes images without
identifiers, under salted-hash names (docs/dicom.md).
"""

from __future__ import annotations

import stat
from pathlib import Path

from fedsca_pipeline.data.readers.common import DICOM, split_name
from fedsca_pipeline.data.site_folder.discovery import is_own_file
from fedsca_pipeline.data.site_folder.site_file import SiteFile, read_site_file
from fedsca_pipeline.errors import DataError, counted

KINDS = ("images", "masks")


def open_site(folder: Path) -> SiteFile:
    """Return the ``site.yml`` of a raw site that holds nothing to hide; the defaults if there is no such file.

    Raises:
        DataError: the folder is missing, holds a DICOM file, asks for hidden names, or has a wrong ``site.yml``. No
            message about DICOM quotes a file's name, which may name a patient.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such site folder; make it with images/ and masks/ in it, or drop the site")
    entries = (path for kind in KINDS for path in visible_entries(folder / kind))
    if found := sum(is_dicom(path, folder) for path in entries):
        raise DataError(
            f"{folder}: {counted(found, 'DICOM file')} or series; {_import(folder, 'dicom')}"
            " DICOM files may name patients, so raw data hold none (docs/dicom.md)"
        )
    site_file = read_site_file(folder)
    if site_file.hide_names:
        raise DataError(
            f"{folder / 'site.yml'}: hide_names: true; {_import(folder, 'site_folder')}"
            " Names of raw files appear in results, so only an import can hide them (docs/dicom.md)"
        )
    return site_file


def _import(folder: Path, importer: str) -> str:
    return (
        "move the folder out of the raw data and import it from its new place: kedro run --pipeline=import_sites "
        f'--params="importer={importer},source=<new place>,import_options.site={folder.name}".'
    )


def visible_entries(folder: Path) -> list[Path]:
    """Return the files and folders in ``folder`` whose names do not start with a dot, sorted; none without it."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def is_dicom(path: Path, home: Path) -> bool:
    """Return whether a file is DICOM, by suffix, name or preamble; a folder is, if a file in it is.

    A link out of ``home`` is never opened, nor is a pipe or a device.
    """
    if path.is_dir():
        return any(is_dicom(file, home) for file in visible_entries(path) if not file.is_dir())
    if split_name(path.name)[1] == DICOM or path.name.upper() == "DICOMDIR":
        return True
    try:
        if not (stat.S_ISREG(path.lstat().st_mode) or is_own_file(path, home)):
            return False
        with path.open("rb", buffering=0) as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False
