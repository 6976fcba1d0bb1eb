"""The laws of the split: a partition, no subject on two sides, exact counts, nothing drawn twice."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fedsca_pipeline.config import SplitConfig
from fedsca_pipeline.data.preprocessing.split import SplitTargets, draw_split, split_targets
from fedsca_pipeline.errors import DataError

GROUPS = st.lists(st.integers(1, 6), min_size=3, max_size=25)
SEEDS = st.integers(0, 2**32)
TARGETS = st.builds(SplitTargets, st.integers(1, 20), st.integers(1, 20))


def images_of(sizes: list[int]) -> dict[str, str]:
    return {f"s{subject}_{n}": f"s{subject}" for subject, size in enumerate(sizes) for n in range(size)}


def sides(subjects: dict[str, str], split: dict[str, str]) -> dict[str, set[str]]:
    result = defaultdict(set)
    for image, subject in subjects.items():
        result[subject].add("train" if split[image] == "unused" else split[image])
    return result


@given(GROUPS, TARGETS, SEEDS, st.one_of(st.none(), st.integers(1, 10)))
def test_the_split_is_a_partition_by_subject(
    sizes: list[int], targets: SplitTargets, seed: int, max_train: int | None
) -> None:
    subjects = images_of(sizes)

    split = draw_split("north", subjects, targets, seed=seed, max_train=max_train)

    counts = Counter(split.values())
    assert split.keys() == subjects.keys()
    assert all(len(side) == 1 for side in sides(subjects, split).values())
    assert min(counts["train"], counts["validation"], counts["test"]) >= 1
    assert counts["train"] <= (max_train or len(subjects))
    assert not (counts["unused"] and counts["train"] != max_train)


@given(st.integers(3, 60), st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_counts_are_exact_where_each_image_is_its_own_subject(
    images: int, validation: int, test: int, seed: int
) -> None:
    targets = split_targets("north", images, SplitConfig(validation=validation, test=test))

    split = draw_split("north", images_of([1] * images), targets, seed=seed)

    counts = Counter(split.values())
    assert counts["validation"] == min(validation, images - 2)
    assert counts["test"] == min(test, images - counts["validation"] - 1)


@given(GROUPS, TARGETS, SEEDS, st.randoms())
def test_the_order_of_the_files_does_not_matter(sizes: list[int], targets: SplitTargets, seed: int, random) -> None:
    subjects = images_of(sizes)
    shuffled = list(subjects.items())
    random.shuffle(shuffled)

    assert draw_split("north", dict(shuffled), targets, seed=seed, max_train=5) == draw_split(
        "north", subjects, targets, seed=seed, max_train=5
    )


@given(GROUPS, GROUPS, TARGETS, TARGETS, SEEDS, st.one_of(st.none(), st.integers(1, 10)))
def test_known_subjects_and_images_keep_their_split_when_others_come(
    sizes: list[int],
    more: list[int],
    targets: SplitTargets,
    later_targets: SplitTargets,
    seed: int,
    max_train: int | None,
) -> None:
    before = images_of(sizes)
    first = draw_split("north", before, targets, seed=seed, max_train=max_train)
    known = {subject: next(iter(side)) for subject, side in sides(before, first).items()}
    after = {**before, **{f"new{image}": f"new{subject}" for image, subject in images_of(more).items()}}

    second = draw_split("north", after, later_targets, seed=seed, max_train=max_train, known=known, known_images=first)

    assert {image: second[image] for image in before} == first
    assert all(len(side) == 1 for side in sides(after, second).values())


@given(st.integers(20, 60), SEEDS)
def test_new_images_fill_what_is_short(images: int, seed: int) -> None:
    before = images_of([1] * images)
    first = draw_split("north", before, SplitTargets(3, 5), seed=seed)
    after = images_of([1] * (2 * images))

    second = draw_split("north", after, SplitTargets(6, 10), seed=seed, known=first, known_images=first)

    counts = Counter(second.values())
    assert (counts["validation"], counts["test"]) == (6, 10)


@given(SEEDS, SEEDS)
def test_seed_and_site_draw_different_splits(one: int, two: int) -> None:
    assume(one != two)
    subjects = images_of([1] * 60)
    targets = SplitTargets(20, 20)

    first = draw_split("north", subjects, targets, seed=one)

    assert draw_split("north", subjects, targets, seed=two) != first
    assert draw_split("south", subjects, targets, seed=one) != first


def test_grouped_counts_come_as_near_as_whole_subjects_can() -> None:
    subjects = images_of([5] * 12)

    counts = Counter(draw_split("north", subjects, SplitTargets(12, 23), seed=0).values())

    assert (counts["validation"], counts["test"], counts["train"]) == (10, 25, 25)


@pytest.mark.parametrize(("images", "expected"), [(38, (6, 12, 20, 0)), (112, (6, 12, 32, 62)), (16, (6, 9, 1, 0))])
def test_training_takes_what_is_left_up_to_its_limit(images: int, expected: tuple[int, ...]) -> None:
    config = SplitConfig(validation=12, test=30, max_train=32, overrides={"north": {"validation": 6, "test": 12}})

    split = draw_split(
        "north", images_of([1] * images), split_targets("north", images, config), seed=3, max_train=config.max_train
    )

    counts = Counter(split.values())
    assert tuple(counts[name] for name in ("validation", "test", "train", "unused")) == expected


def test_shares_are_of_the_sites_images_and_at_least_one() -> None:
    assert split_targets("north", 40, SplitConfig()) == SplitTargets(6, 10)
    assert split_targets("north", 4, SplitConfig(validation=0.1, test=0.1)) == SplitTargets(1, 1)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_split_set_to_nothing_is_refused(split: str) -> None:
    with pytest.raises(DataError, match=rf"north.*preprocessing\.split\.{split}"):
        split_targets("north", 40, SplitConfig(**{split: 0}))


def test_too_few_subjects_name_the_site_and_the_cure() -> None:
    with pytest.raises(DataError, match=r"north: no subject is left for .*add subjects"):
        draw_split("north", images_of([20, 20]), SplitTargets(5, 5), seed=0)
