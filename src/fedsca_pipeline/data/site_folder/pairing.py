"""Pairs of image and mask by stem; every other file is listed as broken."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path

from fedsca_pipeline.data.readers.common import LITTER, BrokenSampleError, litter, no_reader, split_name
from fedsca_pipeline.data.readers.images import READERS
from fedsca_pipeline.data.readers.volumes import VOLUME_READERS, is_volume
from fedsca_pipeline.data.site_folder.discovery import leads_out
from fedsca_pipeline.errors import DataError

SUFFIXES: tuple[str, ...] = (*READERS, *VOLUME_READERS)
"""Suffixes of all files that are read, flat images first."""

# Parts of a message in which two files with the same fault differ.
_VARYING = re.compile(r"\b(images|masks)/\S+|'[^']*'|\d+")

# Files named per fault, and faults listed in one message.
_NAMED, _LISTED = 3, 20


@dataclass(frozen=True)
class Broken:
    """A file that cannot be used; ``file`` is relative to the site folder."""

    file: str
    reason: str
    cure: str

    @classmethod
    def of(cls, file: str, error: BrokenSampleError) -> Broken:
        """Return the entry for a file and its reader's error, whose quotes are escaped."""
        return cls(file, shown(error.reason), shown(error.cure))

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}; {self.cure}"

    def as_dict(self) -> dict[str, str]:
        """Return the three fields."""
        return asdict(self)


def by_fault(broken: Sequence[Broken], home: str = "") -> list[Broken]:
    """Return one entry per fault, the commonest first; for several files ``file`` is their number and first names.

    Reasons, and cures, that differ in numbers, file names or quotes only are one fault, described by its first file.
    ``home`` is put before each name.
    """
    faults: dict[str, list[Broken]] = defaultdict(list)
    for entry in broken:
        faults[_VARYING.sub("#", f"{entry.reason}; {entry.cure}")].append(entry)
    return [_together(entries, home) for entries in sorted(faults.values(), key=len, reverse=True)]


def list_faults(broken: Sequence[Broken], home: str, everywhere: str) -> str:
    """Return an indented line per fault (``by_fault``); ``everywhere`` says where all files are listed, if many."""
    faults = by_fault(broken, home)
    lines = [str(fault) for fault in faults[:_LISTED]]
    if len(faults) > _LISTED:
        lines.append(f"... and {len(faults) - _LISTED} more faults")
    if len(broken) > _NAMED:
        lines.append(f"(each file: {everywhere})")
    return "".join(f"\n  {line}" for line in lines)


def _together(entries: Sequence[Broken], home: str) -> Broken:
    first = entries[0]
    names = ", ".join(f"{home}{entry.file}" for entry in entries[:_NAMED])
    if len(entries) > 1:
        alike = "" if all((entry.reason, entry.cure) == (first.reason, first.cure) for entry in entries) else " alike"
        names = f"{len(entries)} files{alike} ({names}{', ...' * (len(entries) > _NAMED)})"
    return replace(first, file=names)


def shown(name: str) -> str:
    """Return a name with unprintable characters escaped, which could break a line or control a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in name
    )


@dataclass(frozen=True)
class Pair:
    """An image and its mask, POSIX paths relative to the site folder."""

    stem: str
    image: str
    mask: str


def pair_files(folder: Path) -> tuple[list[Pair], list[Broken]]:
    """Pair ``images/`` with ``masks/`` by stem; pairs come in stem order.

    Hidden files are skipped; every other file is in a pair or broken. A file outside of ``folder`` is broken.

    Raises:
        DataError: a folder is missing or holds no file.
    """
    broken: list[Broken] = []
    inside = folder.resolve()
    images = _by_stem(folder, "images", inside, broken)
    masks = _by_stem(folder, "masks", inside, broken)
    pairs = []
    for stem in sorted(images.keys() | masks.keys()):
        here, there = images.get(stem, []), masks.get(stem, [])
        if len(here) == len(there) == 1:
            pairs.append(Pair(stem, here[0], there[0]))
        elif not there:
            suffix = ".nii.gz" if is_volume(here[0]) else ".png"
            cure = f"add masks/{stem}{suffix} (all zero if it shows none) or delete the image"
            broken.extend(Broken(file, "image without a mask", cure) for file in here)
        elif not here:
            broken.extend(Broken(file, "mask without an image", f"add images/{stem}.* or rename it") for file in there)
        else:
            ambiguous = here if len(here) > 1 else there
            reason = f"{len(ambiguous)} files share the stem {stem!r}: {', '.join(ambiguous)}"
            broken.extend(Broken(file, reason, "keep one, or rename each with its mask") for file in ambiguous)
    return pairs, broken


def _by_stem(folder: Path, kind: str, inside: Path, broken: list[Broken]) -> dict[str, list[str]]:
    if not (folder / kind).is_dir():
        raise DataError(f"{folder}: no {kind} folder; put the site's {kind} into {folder / kind}, one file per image")
    found: dict[str, list[str]] = defaultdict(list)
    # Resolving every path is slow; within a folder only a link can lead elsewhere.
    elsewhere = not (folder / kind).resolve().is_relative_to(inside)
    entries = [entry for entry in os.scandir(folder / kind) if not entry.name.startswith(".")]
    for entry in sorted(entries, key=attrgetter("name")):
        file = f"{kind}/{entry.name}"
        stem, suffix = split_name(entry.name)
        # A directory entry knows its type without a system call, but raises for a link to itself.
        place = Path(entry) if entry.is_symlink() else entry
        if leads_out(place, inside) if isinstance(place, Path) else elsewhere:
            broken.append(Broken(shown(file), "a link that leads out of the site folder", "copy the file itself here"))
        elif error := _unusable(place, kind, suffix):
            broken.append(Broken.of(shown(file), error))
        else:
            found[stem].append(file)
    if not entries:
        raise DataError(f"{folder / kind}: no files; put the site's {kind} there, one file per image")
    return found


def _unusable(entry: Path | os.DirEntry[str], kind: str, suffix: str) -> BrokenSampleError | None:
    """Return the fault of an entry of images/ or masks/ that is seen before it is opened."""
    if not entry.name.isprintable():
        return BrokenSampleError(
            "its name holds unprintable characters", "rename it, and its partner, in plain letters"
        )
    if entry.is_dir():
        return BrokenSampleError(f"a folder within {kind}/ is not read", f"move its files up into {kind}/")
    if not entry.is_file():
        what = "a link that leads nowhere" if entry.is_symlink() else "a pipe or a device, not a file"
        return BrokenSampleError(what, "put the file itself here")
    if suffix in SUFFIXES:
        return None
    return litter() if entry.name.lower() in LITTER else no_reader(suffix, SUFFIXES)
