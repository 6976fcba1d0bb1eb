"""What an importer is: patterns that say which files of a source are images of which site, and how masks are read.

A pattern is a path relative to the source with ``{placeholders}``: ``{site}/images/{stem}.png``. A placeholder stands
for one or more characters within one name, and for the same characters wherever it comes again; ``*`` stands for any
characters within a name, ``**/`` for any folders. ``[ab]`` and ``?`` are those characters themselves.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedsca_pipeline.errors import ConfigError, DataError
from fedsca_pipeline.sites.importers.labels import Label

_TOKEN = re.compile(r"\{(\w*)\}|(\*\*/)|(\*)")


@dataclass(frozen=True)
class Sample:
    """An image and the files that make its mask, all below the source; more than one are one object each.

    No file at all is an image without foreground, unless ``fault``, a reason and a cure, says why it cannot be used.
    """

    site: str
    stem: str
    subject: str
    image: Path
    masks: tuple[Path, ...]
    fault: tuple[str, str] | None = None


@dataclass(frozen=True)
class Patterns:
    """One way in which images and masks lie in a source.

    ``site``, ``stem`` and ``subject`` are made of the placeholders of ``images``; those of ``masks`` have the values
    that they have there. ``site`` may be a plain word. A mask may be missing only with ``empty_without_mask``, and is
    made of several files only with ``joined``.
    """

    images: str
    masks: str
    site: str = "{site}"
    stem: str = "{stem}"
    subject: str = "{stem}"
    joined: bool = False
    empty_without_mask: bool = False


@dataclass(frozen=True)
class Importer:
    """A published layout.

    ``label`` turns the files of one mask, and the image's height and width, into uint8 [H, W] of classes, 0 background
    (``labels.py``); ``classes`` names them from 1 on. ``regroup`` may give an image another site once it is read.
    ``options`` are the keys of ``import_options``, from which, and the source, ``configure`` makes the importer.
    """

    title: str
    licence: str
    classes: tuple[str, ...]
    label: Label
    patterns: tuple[Patterns, ...]
    regroup: Callable[[np.ndarray], str] | None = None
    options: tuple[str, ...] = ()
    configure: Callable[[Path, Mapping[str, str]], Importer] | None = None

    def find(self, source: Path) -> list[Sample]:
        """Return the samples below ``source``, by site and stem.

        Raises:
            DataError: there is none.
        """
        samples = sorted(_samples(source, self.patterns), key=lambda sample: (sample.site, sample.stem))
        if not samples:
            wanted = "; ".join(pattern.images for pattern in self.patterns)
            raise DataError(f"{source}: holds nothing of the layout of {self.title} ({wanted})")
        return samples


def match_files(names: Iterable[str], pattern: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield those of the names (POSIX paths) that match, each with the values of the pattern's placeholders.

    Raises:
        ConfigError: the pattern has a placeholder without a name.
    """
    compiled = re.compile(_expression(pattern), re.DOTALL)
    for name in names:
        if match := compiled.fullmatch(name):
            yield name, match.groupdict()


def _samples(source: Path, patterns: Iterable[Patterns]) -> Iterator[Sample]:
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for pattern in patterns:
        images = list(match_files(names, pattern.images))
        shared = sorted(_placeholders(pattern.images) & _placeholders(pattern.masks))
        masks: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name, values in match_files(names, pattern.masks):
            masks[tuple(values[key] for key in shared)].append(name)
        taken = {name for found in masks.values() for name in found}
        for name, values in images:
            # A pattern such as {stem}.png for images matches {stem}_mask.png, too.
            if name in taken:
                continue
            own = masks.get(tuple(values[key] for key in shared), [])
            fault = None
            if len(own) > 1 and not pattern.joined:
                fault = f"{len(own)} masks: {', '.join(own[:3])}", "keep one, or say by the layout which is whose"
            elif not own and not pattern.empty_without_mask:
                fault = f"no mask as {pattern.masks}", "add it, or take the image away"
            yield Sample(
                pattern.site.format(**values),
                pattern.stem.format(**values),
                pattern.subject.format(**values),
                source / name,
                tuple(source / mask for mask in own),
                fault,
            )


def _placeholders(pattern: str) -> set[str]:
    return {match[1] for match in _TOKEN.finditer(pattern) if match[1]}


def _expression(pattern: str) -> str:
    parts, end, seen = [], 0, set()
    for token in _TOKEN.finditer(pattern):
        parts.append(re.escape(pattern[end : token.start()]))
        name, folders, _ = token.groups()
        if folders:
            parts.append("(?:[^/]+/)*")
        elif name is None:
            parts.append("[^/]*")
        elif not name:
            raise ConfigError(f"{pattern}: a placeholder without a name; write for instance {{stem}}")
        else:
            parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)")
            seen.add(name)
        end = token.end()
    return "".join([*parts, re.escape(pattern[end:])])
