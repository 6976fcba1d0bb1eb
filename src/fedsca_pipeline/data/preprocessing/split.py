"""Training, validation and test images, split by subject and drawn once from a seed (docs/data.md)."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsca_pipeline.config import SplitConfig
from fedsca_pipeline.errors import DataError, counted

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitTargets:
    """Numbers of images wanted for validation and test."""

    validation: int
    test: int


def split_targets(site: str, images: int, config: SplitConfig) -> SplitTargets:
    """Return the numbers of images for shares or numbers; at least one image is left for each split drawn later.

    A number above the site's images is cut.

    Raises:
        DataError: validation or test is 0.
    """
    wanted = {"validation": config.validation, "test": config.test, **config.overrides.get(site, {})}
    for split, value in wanted.items():
        if value == 0:
            raise DataError(f"site {site}: no {split} image; set preprocessing.split.{split} (or its override) above 0")
    counts = {split: max(1, round(value * images)) if value < 1 else int(value) for split, value in wanted.items()}
    validation = min(counts["validation"], max(images - 2, 0))
    return SplitTargets(validation, min(counts["test"], max(images - validation - 1, 0)))


def draw_split(
    site: str,
    subjects: Mapping[str, str],
    targets: SplitTargets,
    *,
    seed: int,
    max_train: int | None = None,
    known: Mapping[str, str] | None = None,
    known_images: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return each image's split: ``train``, ``validation``, ``test``, or ``unused`` (training above ``max_train``).

    A hash of seed, site and subject orders the subjects, independently of the site's other subjects. In this order they
    fill validation, then test; the rest trains. A split takes a subject that brings it nearer to its target, so counts
    are exact if each image is its own subject.

    Args:
        site: the site's name.
        subjects: image to subject.
        targets: of :func:`split_targets`.
        seed: the run's seed.
        max_train: number of training images to use, the first in that order. None: all.
        known: subject to its earlier split, which it keeps.
        known_images: image to its earlier split, ``train`` or ``unused`` among them.

    Raises:
        DataError: a split would be empty.
    """
    sizes = Counter(subjects.values())
    order = sorted(sizes, key=lambda subject: _rank(seed, site, subject))
    side = {subject: split for subject, split in (known or {}).items() if subject in sizes}
    pool = [subject for subject in order if subject not in side]
    for split, target in (("validation", targets.validation), ("test", targets.test)):
        later = SPLITS[:1] if split == "test" else ("train", "test")
        reserve = sum(name not in side.values() for name in later)
        taken = _fill(pool, sizes, target, filled=sum(sizes[s] for s in side if side[s] == split), reserve=reserve)
        side.update(dict.fromkeys(taken, split))
        pool = [subject for subject in pool if subject not in side]
    side.update(dict.fromkeys(pool, "train"))
    if missing := [split for split in SPLITS if split not in side.values()]:
        there = f"{counted(len(subjects), 'image')} of {counted(len(sizes), 'subject')}"
        raise DataError(
            f"site {site}: no subject is left for {' and '.join(missing)} ({there}); add subjects, check the group "
            "rule in site.yml, or lower preprocessing.split"
        )
    return _cap_training(subjects, order, side, max_train, known_images or {})


def _fill(pool: Sequence[str], sizes: Mapping[str, int], target: int, *, filled: int, reserve: int) -> list[str]:
    room = len(pool) - reserve
    taken: list[str] = []
    start = filled
    for subject in pool:
        if len(taken) < room and abs(filled + sizes[subject] - target) < abs(filled - target):
            taken.append(subject)
            filled += sizes[subject]
    if not taken and start == 0 and room > 0:
        taken = [min(pool, key=lambda subject: sizes[subject])]
    return taken


def _cap_training(
    subjects: Mapping[str, str],
    order: Sequence[str],
    side: Mapping[str, str],
    max_train: int | None,
    known_images: Mapping[str, str],
) -> dict[str, str]:
    images = defaultdict(list)
    for image in sorted(subjects):
        images[subjects[image]].append(image)
    earlier = {image: split for image, split in known_images.items() if split in ("train", "unused")}
    free = float("inf") if max_train is None else max_train
    free -= sum(earlier.get(image) == "train" for image in subjects if side[subjects[image]] == "train")
    result = {}
    for subject in order:
        for image in images[subject]:
            split = side[subject]
            if split == "train":
                split = earlier.get(image) or ("train" if free > 0 else "unused")
                free -= split == "train" and image not in earlier
            result[image] = split
    return result


def _rank(seed: int, site: str, subject: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{site}\0{subject}".encode()).digest()
