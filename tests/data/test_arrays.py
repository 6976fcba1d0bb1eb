"""Cached arrays come back row by row, exactly, and a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedsca_pipeline.data import arrays as arrays_module
from fedsca_pipeline.data.arrays import PooledArrays, SiteArrays, known_classes, scored_classes
from fedsca_pipeline.data.manifest import manifest_digest
from fedsca_pipeline.errors import DataError

COUNT, SIDE = 6, 16


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "images": rng.integers(0, 256, (COUNT, 3, SIDE, SIDE), dtype=np.uint8),
        "masks": rng.integers(0, 3, (COUNT, SIDE, SIDE), dtype=np.uint8),
        "sizes": np.array([[16, 10 + row] for row in range(COUNT)], np.int32),
    }


@pytest.fixture
def manifest() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image": [f"images/scan.{row}.png" for row in range(COUNT)],
            "subject": ["007", "007", "b", "c", "d", "e"],
            "split": ["train", "train", "test", "validation", "train", "unused"],
            "row": [5, 0, 1, 2, 3, 4],
            "classes": ["[1]", "[]", "[1, 3]", "[2]", "[2, 1]", "[5]"],
        }
    )


@pytest.fixture
def path(tmp_path: Path, arrays: dict[str, np.ndarray], manifest: pd.DataFrame) -> Path:
    save_file({**arrays, "manifest": manifest_digest(manifest)}, tmp_path / "north.safetensors")
    return tmp_path / "north.safetensors"


def test_splits_list_rows_subjects_and_names_in_manifest_order(path: Path, manifest: pd.DataFrame) -> None:
    site = SiteArrays(path, manifest)

    assert site.rows("train").tolist() == [5, 0, 3]
    assert site.subjects("train") == ["007", "007", "d"]
    assert site.names("train") == ["scan.0", "scan.1", "scan.4"]
    assert site.rows("nothing").tolist() == []
    assert (len(site), site.image_size) == (COUNT, SIDE)


def test_classes_are_those_in_the_masks_of_the_named_splits(path: Path, manifest: pd.DataFrame) -> None:
    site = SiteArrays(path, manifest)

    assert site.classes("train") == (1, 2)
    assert site.classes("train", "validation") == (1, 2)
    assert site.classes("test") == (1, 3)
    assert site.classes("nothing") == ()
    assert site.classes() == (1, 2, 3, 5)
    assert (known_classes(site, 5), scored_classes(site, 5)) == ((1, 2), (1, 2, 3, 5))


def test_other_splits_have_other_classes_and_the_site_the_same(path: Path, manifest: pd.DataFrame) -> None:
    site = SiteArrays(path, manifest).with_splits({"train": [0], "test": [1, 2]})

    assert site.classes("train") == ()
    assert site.classes("test") == (1, 2, 3)
    assert (known_classes(site, 5), scored_classes(site, 5)) == ((1, 2, 3, 4, 5), (1, 2, 3, 5))


def test_pooled_sites_have_the_classes_of_any(path: Path, manifest: pd.DataFrame) -> None:
    whole = SiteArrays(path, manifest)
    pooled = PooledArrays([whole.with_splits({"train": [1]}), whole.with_splits({"train": [2], "test": [4]})], [6, 6])

    assert pooled.classes("train") == (1, 2, 3)
    assert pooled.classes("validation") == ()


def test_a_manifest_without_classes_is_refused_when_it_is_asked(path: Path, manifest: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"no column classes.*preprocessing"):
        SiteArrays(path, manifest.drop(columns="classes")).classes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.integers(0, COUNT - 1), max_size=8))
def test_a_batch_is_these_rows_in_this_order(
    path: Path, manifest: pd.DataFrame, arrays: dict[str, np.ndarray], rows: list[int]
) -> None:
    images, masks, valid = SiteArrays(path, manifest).batch(rows)

    np.testing.assert_array_equal(images, arrays["images"][rows])
    np.testing.assert_array_equal(masks, arrays["masks"][rows])
    assert valid.dtype == bool
    assert valid.shape == (len(rows), SIDE, SIDE)
    assert [mask.sum() for mask in valid] == [16 * (10 + row) for row in rows]
    assert all(mask[:, : 10 + row].all() for mask, row in zip(valid, rows, strict=True))


def test_only_the_rows_asked_for_are_read(path: Path, manifest: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[slice] = []

    class Watched:
        def __init__(self, inner) -> None:
            self.inner = inner

        def get_shape(self) -> list[int]:
            return self.inner.get_shape()

        def __getitem__(self, rows: slice) -> np.ndarray:
            read.append(rows)
            return self.inner[rows]

    class Opened:
        def __init__(self, *args, **kwargs) -> None:
            self.file = opened(*args, **kwargs)

        def get_slice(self, name: str) -> Watched:
            return Watched(self.file.get_slice(name))

        def get_tensor(self, name: str) -> np.ndarray:
            assert name in ("sizes", "manifest")
            return self.file.get_tensor(name)

    opened = arrays_module.safe_open
    monkeypatch.setattr(arrays_module, "safe_open", Opened)

    SiteArrays(path, manifest).batch([4, 2])

    assert read == [slice(4, 5), slice(4, 5), slice(2, 3), slice(2, 3)]


@pytest.mark.parametrize("row", [-1, COUNT])
def test_a_row_that_is_not_there_is_an_error(path: Path, manifest: pd.DataFrame, row: int) -> None:
    with pytest.raises(IndexError, match="not in 0"):
        SiteArrays(path, manifest).batch([row])


def test_a_missing_file_is_named_with_the_cure(tmp_path: Path, manifest: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"gone\.safetensors.*run the preprocessing"):
        SiteArrays(tmp_path / "gone.safetensors", manifest)


def test_a_truncated_file_is_named(path: Path, manifest: pd.DataFrame) -> None:
    path.write_bytes(path.read_bytes()[:-50])

    with pytest.raises(DataError, match=r"north\.safetensors"):
        SiteArrays(path, manifest)


def test_a_file_without_its_arrays_is_named(tmp_path: Path, manifest: pd.DataFrame) -> None:
    save_file({"pictures": np.zeros(3, np.uint8)}, tmp_path / "x.safetensors")

    with pytest.raises(DataError, match=r"x\.safetensors"):
        SiteArrays(tmp_path / "x.safetensors", manifest)


def test_a_manifest_of_other_images_is_refused(path: Path, manifest: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="manifest lists 5"):
        SiteArrays(path, manifest.iloc[:5])


def test_a_manifest_that_splits_the_same_images_otherwise_is_refused(path: Path, manifest: pd.DataFrame) -> None:
    other = manifest.assign(split=list(reversed(manifest["split"])))

    with pytest.raises(DataError, match="it belongs to another manifest"):
        SiteArrays(path, other)
