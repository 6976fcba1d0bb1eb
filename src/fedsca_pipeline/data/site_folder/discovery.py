"""Names and fingerprints of the raw sites. Standard library only: it runs at every start-up."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from fedsca_pipeline.errors import DataError

DEMO_SITES: tuple[str, ...] = ("harbour_ct", "meadow_mri", "summit_ultrasound", "valley_endoscopy")

SITES_READY = ".sites.ready"
"""Folder of finished sites that were written together, before each is moved into place."""

VOLUME_SUFFIXES: tuple[str, ...] = (".nii", ".nii.gz", ".nrrd", ".mha")
"""Suffixes of image files that are read as volumes."""

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What a site may be called: it names data sets, nodes and files."""


def discover_sites(raw: Path) -> tuple[str, ...]:
    """Return the sorted names of the folders under ``raw`` that hold ``images/`` or ``masks/``.

    Folders that start with a dot or an underscore are skipped. A missing or empty ``raw`` gives ().

    Raises:
        DataError: a site folder's name is not letters, digits, ``_`` and ``-`` (it names data sets, nodes and files).
    """
    if not raw.is_dir():
        return ()
    folders = (entry for entry in raw.iterdir() if not entry.name.startswith((".", "_")))
    sites = sorted(folder.name for folder in folders if (folder / "images").is_dir() or (folder / "masks").is_dir())
    for site in sites:
        if not SITE_NAME.fullmatch(site):
            cure = re.sub(r"[^A-Za-z0-9_-]+", "_", site).strip("_-") or "site_1"
            raise DataError(
                f"{raw / site}: a site's folder name is made of letters, digits, '_' and '-', and starts with a letter "
                f"or digit; rename the folder, for instance to {cure!r}"
            )
    return tuple(sites)


def demonstration_sites(raw: Path) -> list[str]:
    """Return the names of the demonstration sites in ``raw``."""
    return [site for site in DEMO_SITES if (raw / site).is_dir()]


def may_hold_volumes(folder: Path) -> bool:
    """Return whether a site folder has an image with a suffix of volumes; no file is opened."""
    images = folder / "images"
    return images.is_dir() and any(
        entry.name.lower().endswith(VOLUME_SUFFIXES) for entry in os.scandir(images) if not entry.name.startswith(".")
    )


def place_finished_sites(raw: Path) -> None:
    """Move finished sites into place; after a kill, the next command completes the move."""
    ready = raw / SITES_READY
    if ready.is_dir():
        for site in sorted(ready.iterdir()):
            site.rename(raw / site.name)
        ready.rmdir()


def fingerprint_site(raw: Path, site: str, known: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return 16 hex digits of the SHA-256 over every file's relative name and content, in name order.

    Hidden files are skipped. A file that cannot be read, or lies elsewhere, counts by its name; the data report says
    what is wrong with it. A missing or empty site folder has a fingerprint too. ``known`` are SHA-256 of files already
    read, by name relative to the site folder.
    """
    folder = raw / site
    digest = hashlib.sha256()
    for name in sorted(_files(folder), key=lambda name: name.split("/")):
        content = known.get(name) or _content(folder / name, folder)
        # A digest per file keeps name and content apart, so no two folders share one stream of bytes.
        digest.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def is_own_file(path: Path, home: Path) -> bool:
    """Return whether a path leads to a file within ``home``; nothing else may be opened, and a pipe would block."""
    return path.is_file() and not leads_out(path, home)


def leads_out(path: Path, home: Path) -> bool:
    """Return whether a path in ``home`` is a link to something outside; a broken link within is not.

    The cache of the DVC project that ``home`` lies in is not outside: ``dvc add`` may replace files by links to it.
    """
    if not path.is_symlink():
        return False
    # Path.resolve raises on a link that leads to itself.
    target, inside = Path(os.path.realpath(path)), Path(os.path.realpath(home))
    project = next((parent for parent in inside.parents if (parent / ".dvc").is_dir()), None)
    cache = inside if project is None else Path(os.path.realpath(project / ".dvc" / "cache"))
    return not target.is_relative_to(inside) and not target.is_relative_to(cache)


def _files(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, relative to it, with slashes."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        within = Path(parent).relative_to(folder).parts
        yield from ("/".join((*within, name)) for name in names if not name.startswith("."))


def _content(path: Path, folder: Path) -> str:
    try:
        if not is_own_file(path, folder):
            return "unreadable"
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return "unreadable"
