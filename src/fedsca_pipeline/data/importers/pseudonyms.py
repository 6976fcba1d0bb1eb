"""Raw sites under names that may be shown: of a site with DICOM files no file name and no patient gets any further.

What comes after reads such a site through a folder of links whose names are salted hashes. It cannot tell what it does
not know, so that no message, table, figure or file name of a result can hold an identifier (docs/dicom.md#identifiers).
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import io
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsca_pipeline.data.readers.common import BrokenSampleError, split_name
from fedsca_pipeline.data.readers.images import READERS
from fedsca_pipeline.data.readers.volume import FRAMES, SEGMENTATION, SERIES
from fedsca_pipeline.data.readers.volumes import MASK_READERS, is_volume
from fedsca_pipeline.data.site_folder.discovery import is_own_file
from fedsca_pipeline.data.site_folder.site_file import HiddenSiteFile, SiteFile, read_site_file
from fedsca_pipeline.errors import DataError
from fedsca_pipeline.files import read_or_create_secret, write_bytes

KINDS = ("images", "masks")
SALT, NAMES, VIEW = "salt", "names.csv", "view"


@dataclass(frozen=True)
class SiteSource:
    """Where and how a site's raw files are to be read.

    ``folder`` holds ``images/`` and ``masks/`` under names that may be shown; ``home`` is the raw site folder, which no
    file may lie outside of. ``names`` is the private table of what the names stand for; None: they are the real ones.
    """

    folder: Path
    home: Path
    site_file: SiteFile
    names: Path | None = None

    @property
    def legend(self) -> str:
        """What to tell the reader of a message with names in it; empty where they are the real ones."""
        return f"Names stand for files of the site as {self.names} lists them." if self.names else ""


def open_site(raw: Path, site: str, private: Path) -> SiteSource:
    """Return how to read a site; one with DICOM files, or ``hide_names`` in its site.yml, under pseudonyms.

    ``private`` is that site's own folder for the salt, the table of names and the links; made where there is something
    to hide, readable by its owner alone. Names are the same as long as the salt is.

    Raises:
        DataError: no such site folder, a wrong ``site.yml``, a damaged salt, or the links cannot be made.
    """
    home = raw / site
    if not home.is_dir():
        raise DataError(f"{home}: no such site folder; make it with images/ and masks/ in it, or drop the site")
    files = [(kind, path) for kind in KINDS for path in _visible(home / kind)]
    has_dicom = any(is_dicom(path, home) for _, path in files)
    site_file = read_site_file(home, terse=has_dicom)
    # Where a whole folder is missing there is no file to name, and the folder itself is to be named.
    if not (has_dicom or site_file.hide_names) or {kind for kind, _ in files} != set(KINDS):
        # Of an earlier time: names must not lead there any more.
        shutil.rmtree(private / VIEW, ignore_errors=True)
        return SiteSource(home, home, site_file)
    try:
        return _Hidden(home, private, site_file).source(files)
    except OSError as error:
        raise DataError(
            f"{private}: the private table of site {site} cannot be written ({error.strerror}); make room there, on a "
            "disk that knows symbolic links"
        ) from None


def readable_folder(raw: Path, site: str, private: Path) -> Path:
    """Return where the paths in a prepared site's manifest lead: its raw folder, or the links to it."""
    view = private / VIEW
    return view if view.is_dir() else raw / site


class _Hidden:
    """Makes the links, and knows who is who while it does."""

    def __init__(self, home: Path, private: Path, site_file: SiteFile) -> None:
        self._home, self._private, self._site_file = home, private, site_file
        private.mkdir(parents=True, exist_ok=True)
        private.chmod(0o700)
        self._salt = _salt(private / SALT)
        self._table: list[tuple[str, str]] = []
        self._subjects: dict[str, str] = {}
        self._refusals: dict[str, tuple[str, str]] = {}

    def source(self, files: list[tuple[str, Path]]) -> SiteSource:
        links = {kind: self._links(kind, [path for own, path in files if own == kind]) for kind in KINDS}
        volumes = {split_name(link)[0] for link in links["images"] if is_volume(link)}
        links["masks"] = {_mask_name(link, volumes): path for link, path in links["masks"].items()}
        for kind, named in links.items():
            self._table += [(f"{kind}/{link}", f"{kind}/{path.name}") for link, path in sorted(named.items())]
        for stem in sorted(set(self._site_file.subjects or {}) - {_stem(path) for _, path in files}):
            self._table.append((self._pseudonym("file", stem), f"{stem} (named in site.yml alone)"))
            self._subjects[self._pseudonym("file", stem)] = ""
        self._write_links(links)
        write_bytes(self._private / NAMES, _as_csv(self._table))
        return SiteSource(self._private / VIEW, self._home, self._hidden_site_file(), self._private / NAMES)

    def _links(self, kind: str, paths: list[Path]) -> dict[str, Path]:
        from fedsca_pipeline.data.readers.dicom import read_header

        found = {}
        for path in paths:
            stem, dicom = _stem(path), is_dicom(path, self._home)
            link = self._pseudonym("file", stem)
            first = _first(path)
            readable = dicom and is_own_file(first, self._home)
            header = read_header(first) if readable and kind == "images" else None
            found[link + _suffix(path, dicom, header.frames if header else 1)] = path
            if kind == "images":
                self._name_subject(link, stem, header.patient if header else None)
        return found

    def _name_subject(self, link: str, stem: str, patient: str | None) -> None:
        """Keep a hash of who an image shows: as site.yml's rule says, else by PatientID, else itself alone."""
        if self._site_file.split_rule is not None:
            try:
                self._subjects[link] = self._pseudonym("rule", self._site_file.subject(stem))
            except BrokenSampleError:
                self._refusals[link] = (
                    "site.yml's rule (group or subjects) finds no subject for it",
                    "mend the rule, or the file's name",
                )
        elif patient == "":
            self._refusals[link] = (
                "holds no PatientID, so nobody knows which images show one patient",
                "enter one, or say in site.yml, by group or subjects, who is who",
            )
        else:
            self._subjects[link] = self._pseudonym(*(("file", stem) if patient is None else ("patient", patient)))

    def _hidden_site_file(self) -> HiddenSiteFile:
        rule = self._site_file.split_rule
        return HiddenSiteFile(
            **self._site_file.model_dump(exclude={"group", "subjects"}),
            subjects=self._subjects,
            refusals=self._refusals,
            rule="PatientID" if rule is None else f"rule of site.yml {self._pseudonym('rule', rule)}",
        )

    def _write_links(self, links: dict[str, dict[str, Path]]) -> None:
        made, view = self._private / f".{VIEW}.partial", self._private / VIEW
        # A killed command may have left it.
        shutil.rmtree(made, ignore_errors=True)
        for kind, named in links.items():
            (made / kind).mkdir(parents=True)
            # From where they will stand, so that a data folder may be moved as a whole.
            start = self._private.resolve() / VIEW / kind
            for link, path in named.items():
                target = path.parent.resolve() / path.name
                (made / kind / link).symlink_to(os.path.relpath(target, start))
        shutil.rmtree(view, ignore_errors=True)
        made.rename(view)

    def _pseudonym(self, kind: str, text: str) -> str:
        message = f"{kind}\0{text}".encode(errors="surrogateescape")
        return hmac.new(self._salt, message, hashlib.sha256).hexdigest()[:16]


def _salt(path: Path) -> bytes:
    """Return a site's salt, drawn where there is none yet."""
    try:
        return read_or_create_secret(path)
    except ValueError as error:
        raise DataError(f"{error}, and every name and subject of the site will be another one") from None


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def is_dicom(path: Path, home: Path) -> bool:
    """Whether a file is DICOM, by its suffix or the mark after its preamble; a folder, if one of its files is."""
    if path.is_dir():
        return any(is_dicom(file, home) for file in _visible(path) if not file.is_dir())
    if split_name(path.name)[1] == ".dcm":
        return True
    try:
        if not (stat.S_ISREG(path.lstat().st_mode) or is_own_file(path, home)):
            return False
        with path.open("rb", buffering=0) as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _first(path: Path) -> Path:
    return next(iter(_visible(path)), path) if path.is_dir() else path


def _stem(path: Path) -> str:
    """Return what pairs a file: of a folder, or of a file with a suffix that tells nothing, the whole name."""
    stem, suffix = split_name(path.name)
    return stem if suffix in _SHOWN and not path.is_dir() else path.name


def _suffix(path: Path, dicom: bool, frames: int) -> str:
    """Return what tells the reader; a suffix that nobody reads may be a part of a name, and is left out."""
    if path.is_dir():
        return SERIES
    suffix = split_name(path.name)[1]
    if suffix != ".dcm" and not (suffix not in _SHOWN and dicom):
        return path.name[len(path.name) - len(suffix) :] if suffix in _SHOWN else ""
    return FRAMES if frames > 1 else ".dcm"


def _mask_name(link: str, volumes: set[str]) -> str:
    stem, suffix = split_name(link)
    return stem + SEGMENTATION if suffix == ".dcm" and stem in volumes else link


def _as_csv(table: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerows([("name", "file"), *table])
    return stream.getvalue().encode(errors="surrogateescape")


_SHOWN = frozenset({*READERS, *MASK_READERS} - {SERIES, FRAMES, SEGMENTATION})
