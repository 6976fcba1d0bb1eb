"""Which image belongs to which mask: by stem, and nothing left out in silence."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from fedsca_pipeline.errors import DataError
from fedsca_pipeline.sites.readers import READERS, BrokenSampleError, no_reader, split_name
from fedsca_pipeline.sites.volumes import FRAMES, IMAGE_READERS, SEGMENTATION, SERIES, is_volume

SUFFIXES: tuple[str, ...] = (*READERS, *IMAGE_READERS, SEGMENTATION)
"""Of every file that is read, flat images first."""

_OF_SITES = [suffix for suffix in SUFFIXES if suffix not in (SERIES, FRAMES, SEGMENTATION)]


@dataclass(frozen=True)
class Broken:
    """A file that cannot be used; ``file`` is relative to the site folder."""

    file: str
    reason: str
    cure: str

    @classmethod
    def of(cls, file: str, error: BrokenSampleError) -> Broken:
        """Name the file of a reader's error."""
        return cls(file, error.reason, error.cure)

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}; {self.cure}"

    def as_dict(self) -> dict[str, str]:
        """Return the three fields."""
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """An image and its mask, POSIX paths relative to the site folder."""

    stem: str
    image: str
    mask: str


def pair_files(folder: Path, home: Path | None = None) -> tuple[list[Pair], list[Broken]]:
    """Pair ``images/`` with ``masks/`` by stem; pairs come in stem order.

    Hidden files are passed over; everything else is in a pair or broken. No file may lie outside of ``home``; left out,
    of ``folder``.

    Raises:
        DataError: a folder is missing or holds no file.
    """
    broken: list[Broken] = []
    inside = (home or folder).resolve()
    images = _by_stem(folder, "images", inside, broken)
    masks = _by_stem(folder, "masks", inside, broken)
    pairs = []
    for stem in sorted(images.keys() | masks.keys()):
        here, there = images.get(stem, []), masks.get(stem, [])
        if len(here) == len(there) == 1:
            pairs.append(Pair(stem, here[0], there[0]))
        elif not there:
            suffix = ".nii.gz" if is_volume(here[0]) else ".png"
            cure = f"add masks/{stem}{suffix} (all zero if it shows none) or take the image away"
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
        raise DataError(f"{folder}: no {kind} folder; put the site's {kind} into {folder / kind}, one file an image")
    found: dict[str, list[str]] = defaultdict(list)
    here = (folder / kind).resolve()
    empty = True
    for path in sorted((folder / kind).iterdir()):
        if path.name.startswith("."):
            continue
        empty = False
        file = f"{kind}/{path.name}"
        stem, suffix = split_name(path.name)
        # Only a link can lead elsewhere; asking the system about every part of every path takes its time.
        if not (path.resolve() if path.is_symlink() else here).is_relative_to(inside):
            broken.append(Broken(file, "a link that leads out of the site folder", "copy the file itself here"))
        elif path.is_dir() and suffix != SERIES:
            broken.append(Broken(file, f"a folder within {kind}/ is not read", f"move its files up into {kind}/"))
        elif suffix not in SUFFIXES:
            broken.append(Broken.of(file, no_reader(suffix, _OF_SITES)))
        else:
            found[stem].append(file)
    if empty:
        raise DataError(f"{folder / kind}: no files; put the site's {kind} there, one file an image")
    return found
