"""Importers: patterns that name the images and masks of a source, and functions that read them.

A pattern is a path relative to the source with ``{placeholders}``: ``{site}/images/{stem}.png``. A placeholder matches
one or more characters within one name, and the same characters wherever it occurs again; ``{child:d}`` matches digits
only, ``{eye:w}`` letters only. ``*`` matches any characters within a name, ``**/`` any folders. ``[ab]`` and ``?`` are
plain characters. Suffixes match in any case.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np

from fedsca_pipeline.data.importers.masks import Label
from fedsca_pipeline.data.importers.pictures import Picture, read_picture
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import visible_files
from fedsca_pipeline.data.readers.common import BrokenSampleError, split_name
from fedsca_pipeline.errors import ConfigError, DataError

_TOKEN = re.compile(r"\{(\w*)(?::(\w*))?\}|(\*\*/)|(\*)")
# What a placeholder of each type matches; no two types have a character in common.
_TYPES = {None: "[^/]", "d": "[0-9]", "w": r"[^\W\d_]"}


Watch = Callable[[Sequence[Path]], Iterable[Path]]
"""Yields files one by one, and may show the progress, as ``rich.progress.track`` does. ``iter`` shows none."""


@dataclass(frozen=True)
class Patterns:
    """One arrangement of images and masks in a source.

    ``site``, ``stem`` and ``subject`` are made of the placeholders of ``images``; ``site`` may be a plain word.
    Placeholders of ``masks`` have their values in ``images``. A mask may be missing only with ``empty_without_mask``,
    and may be several files only with ``joined``. If several patterns match an image, the first that has its mask is
    used.
    """

    images: str
    masks: str
    site: str = "{site}"
    stem: str = "{stem}"
    subject: str = "{stem}"
    joined: bool = False
    empty_without_mask: bool = False
    label: Label | None = None

    def __post_init__(self) -> None:
        for pattern in (self.images, self.masks):
            _check_neighbours(pattern)
        known = _placeholders(self.images)
        for name in ("site", "stem", "subject"):
            if unknown := _placeholders(getattr(self, name)) - known:
                raise ConfigError(
                    f"{self.images}: {name} contains {{{min(unknown)}}}, which images lacks; "
                    f"it has {', '.join(sorted(known)) or 'none'}"
                )


@dataclass(frozen=True)
class Importer:
    """A published layout.

    ``label`` turns the files of one mask, and their image, into uint8 classes, 0 background (``masks.py``); ``classes``
    names them from 1 on. ``refine`` completes the samples that the patterns found, from tables in the source: sites,
    subjects, several images in one file. ``read`` reads a sample whose image is not one file; it may ignore the label.
    ``regroup`` returns an image's site from its pixels. ``configure`` makes the importer from the source and
    ``import_options``, whose keys are ``options``; it passes each file that it opens through ``watch``. ``merged``
    makes one class of all. ``modalities`` names the entries of the fourth axis, if volumes have one. ``hides_names``:
    nothing that is written or printed holds a name from the source; images and subjects get salted-hash names.
    ``notes`` and ``spacing`` go into ``site.yml``.
    """

    title: str
    licence: str
    classes: tuple[str, ...]
    patterns: tuple[Patterns, ...]
    label: Label | None = None
    refine: Callable[[Path, list[Sample]], Iterable[Sample]] | None = None
    read: Callable[[Sample, Label], Picture] = read_picture
    regroup: Callable[[np.ndarray], str] | None = None
    options: tuple[str, ...] = ()
    configure: Callable[[Path, Mapping[str, str], Watch], Importer] | None = None
    merged: bool = False
    modalities: tuple[str, ...] = ()
    hides_names: bool = False
    notes: str = ""
    spacing: tuple[float, float] | None = None

    def merge(self, name: str) -> Importer:
        """Return an importer with the one class ``name``, which is everything but background."""
        return replace(self, classes=(name,), merged=True)

    def picture(self, sample: Sample) -> Picture:
        """Return a sample's image and mask.

        Raises:
            UnusableError: the broken file, and what is wrong with it.
        """
        # None only where ``read`` ignores the label.
        label = cast("Label", sample.label or self.label)
        picture = self.read(sample, label)
        return replace(picture, mask=(picture.mask > 0).astype(np.uint8)) if self.merged else picture

    def find(self, source: Path) -> list[Sample]:
        """Return the samples below ``source``, sorted by site and stem.

        Raises:
            DataError: there are none, or a table in the source cannot be used.
        """
        samples = _samples(source, self.patterns)
        try:
            if samples and self.refine is not None:
                samples = list(self.refine(source, samples))
        except DataError:
            if not self.hides_names:
                raise
            raise DataError(
                "source: a table or name in it does not fit the layout; to see which, import it once with "
                "hide_names=false and data_root=<another folder>"
            ) from None
        if not samples:
            wanted = [pattern.images for pattern in self.patterns]
            there = _there(source, example=not self.hides_names)
            start = (
                "" if all(one.startswith("**/") for one in wanted) else "; patterns start at the source, **/ below it"
            )
            raise DataError(
                f"{source}: holds nothing of the layout of {self.title} ({'; '.join(wanted)}); there {there}{start}"
            )
        return sorted(samples, key=lambda sample: (sample.site, sample.stem))


def match_files(names: Iterable[str], pattern: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the names (POSIX paths) that match, each with the values of the pattern's placeholders.

    Names, pattern and values are compared in NFC.

    Raises:
        ConfigError: the pattern has a placeholder without a name, or of an unknown type.
    """
    compiled = re.compile(_expression(unicodedata.normalize("NFC", pattern)), re.DOTALL)
    for name in names:
        if match := compiled.fullmatch(unicodedata.normalize("NFC", name)):
            yield name, match.groupdict()


def _there(source: Path, *, example: bool) -> str:
    """Return what files a source has, by suffix, and an ``example`` of the commonest; names may name patients."""
    files = visible_files(source)
    suffixes = Counter(split_name(path.name)[1] for path in files).most_common(5)
    if not suffixes:
        return "is no file"
    listed = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes)
    first = next(path for path in files if split_name(path.name)[1] == suffixes[0][0])
    named = f", such as {first.relative_to(source).as_posix()}" if example else ""
    return f"are other files ({listed}{named})"


def _samples(source: Path, patterns: Iterable[Patterns]) -> list[Sample]:
    names = sorted(path.relative_to(source).as_posix() for path in visible_files(source))
    found: dict[tuple[Path, ...], Sample] = {}
    for pattern in patterns:
        for sample in _of_pattern(source, names, pattern):
            if sample.images not in found or (found[sample.images].fault and not sample.fault):
                found[sample.images] = sample
    return list(found.values())


def _of_pattern(source: Path, names: Iterable[str], pattern: Patterns) -> Iterator[Sample]:
    shared = sorted(_placeholders(pattern.images) & _placeholders(pattern.masks))
    masks: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, values in match_files(names, pattern.masks):
        masks[tuple(values[key] for key in shared)].append(name)
    taken = {name for found in masks.values() for name in found}
    for name, values in match_files(names, pattern.images):
        # A pattern such as {stem}.png for images also matches {stem}_mask.png.
        if name in taken:
            continue
        own = masks.get(tuple(values[key] for key in shared), [])
        fault = None
        if len(own) > 1 and not pattern.joined:
            fault = BrokenSampleError(
                f"{len(own)} masks", "keep one, or give each image a mask by the layout's patterns", ", ".join(own[:3])
            )
        elif not own and not pattern.empty_without_mask:
            fault = BrokenSampleError(f"no mask as {pattern.masks}", "add it, or delete the image")
        yield Sample(
            _filled(pattern.site, values),
            _filled(pattern.stem, values),
            _filled(pattern.subject, values),
            (source / name,),
            tuple(source / mask for mask in own),
            fault,
            label=pattern.label,
        )


def _filled(name: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)(?::\w*)?\}", lambda token: values[token[1]], name)


def _placeholders(pattern: str) -> set[str]:
    return {match[1] for match in _TOKEN.finditer(pattern) if match[1]}


def _check_neighbours(pattern: str) -> None:
    """Check that no two neighbours in a pattern match the same characters, so that nobody guesses where one ends.

    Raises:
        ConfigError: two do.
    """
    tokens = [token for token in _TOKEN.finditer(pattern) if not token[3]]
    for one, other in pairwise(tokens):
        types = {one[2], other[2]}
        if one.end() == other.start() and (one[1] or other[1]) and (None in types or len(types) == 1):
            raise ConfigError(
                f"{pattern}: {one[0]} and {other[0]} stand side by side, so where one ends would be a guess; put a "
                "character between them, or give both a type: {child:d} stands for digits, {eye:w} for letters"
            )


def _expression(pattern: str) -> str:
    parts, end, seen = [], 0, set()
    for token in _TOKEN.finditer(pattern):
        parts.append(re.escape(pattern[end : token.start()]))
        name, kind, folders, _ = token.groups()
        if folders:
            parts.append("(?:[^/]+/)*")
        elif name is None:
            parts.append("[^/]*")
        elif not name:
            raise ConfigError(f"{pattern}: a placeholder without a name; write for instance {{stem}}")
        elif kind not in _TYPES:
            raise ConfigError(f"{pattern}: {token[0]}: no such type; d stands for digits, w for letters")
        else:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{_TYPES[kind]}+?)")
            seen.add(name)
        end = token.end()
    # A suffix is one only behind something.
    rest, suffix = split_name(f"*{pattern[end:]}")
    return "".join([*parts, re.escape(rest[1:]), f"(?i:{re.escape(suffix)})"])
