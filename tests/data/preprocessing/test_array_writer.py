"""Rows written one by one are the file that the same arrays would be, whatever was left out in the end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import manifest_digest
from fedsca_pipeline.data.preprocessing.array_writer import ArraysFile, ArraysWriter

SIDE = 16


def manifest_of(rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image": [f"images/{row}.png" for row in range(rows)],
            "subject": [str(row) for row in range(rows)],
            "split": ["train"] * rows,
            "row": range(rows),
        }
    )


def row_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    height, width = rng.integers(1, SIDE, 2, endpoint=True)
    image = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    return image, rng.integers(0, 3, (height, width), dtype=np.uint8)


def written(folder: Path, numbers: list[int], keep: list[int]) -> ArraysFile:
    with ArraysWriter(folder, "north", SIDE) as writer:
        for number in numbers:
            writer.append(*row_of(number))
        return writer.finish(keep, manifest_of(len(keep)))


@settings(deadline=None)
@given(kept=st.lists(st.booleans(), max_size=8))
def test_exactly_the_rows_that_are_kept_are_in_the_file_in_their_order(kept: list[bool]) -> None:
    keep = [row for row, stays in enumerate(kept) if stays]
    expected = {
        "images": np.zeros((len(keep), 3, SIDE, SIDE), np.uint8),
        "masks": np.zeros((len(keep), SIDE, SIDE), np.uint8),
        "sizes": np.zeros((len(keep), 2), np.int32),
        "manifest": manifest_digest(manifest_of(len(keep))),
    }
    for place, number in enumerate(keep):
        image, mask = row_of(number)
        height, width = mask.shape
        expected["images"][place, :, :height, :width] = image
        expected["masks"][place, :height, :width] = mask
        expected["sizes"][place] = height, width

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "north.safetensors"
        written(Path(folder), list(range(len(kept))), keep).move_to(target)
        stored = load_file(target)

        assert stored.keys() == expected.keys()
        for name, array in expected.items():
            assert stored[name].dtype == array.dtype
            np.testing.assert_array_equal(stored[name], array)
        assert [path.name for path in Path(folder).iterdir()] == ["north.safetensors"]


def test_what_is_written_is_what_the_reader_of_sites_takes(tmp_path: Path) -> None:
    written(tmp_path, [0, 1, 2], [0, 2]).move_to(tmp_path / "deep" / "north.safetensors")

    images, masks, valid = SiteArrays(tmp_path / "deep" / "north.safetensors", manifest_of(2)).batch([1])

    image, mask = row_of(2)
    height, width = mask.shape
    np.testing.assert_array_equal(images[0, :, :height, :width], image)
    np.testing.assert_array_equal(masks[0, :height, :width], mask)
    assert valid.sum() == height * width


def test_a_finished_file_can_be_read_before_it_has_a_place_and_after(tmp_path: Path) -> None:
    arrays = written(tmp_path, [0, 1], [1])
    before = {name: arrays[name] for name in arrays}

    arrays.move_to(tmp_path / "north.safetensors")

    assert list(before) == ["images", "masks", "sizes", "manifest"]
    assert all(np.array_equal(arrays[name], before[name]) for name in before)
    assert "pictures" not in arrays


def test_a_file_that_nobody_places_leaves_nothing(tmp_path: Path) -> None:
    arrays = written(tmp_path, [0, 1], [0, 1])
    assert list(tmp_path.iterdir())

    del arrays
    gc.collect()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_on_the_way_leaves_the_earlier_file_and_nothing_beside_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "north.safetensors"
    written(tmp_path, [0], [0]).move_to(target)
    before = target.read_bytes()

    with pytest.raises(error), ArraysWriter(tmp_path, "north", SIDE) as writer:
        writer.append(*row_of(1))
        raise error

    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("room", [100, 40_000, 50_000])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(tmp_path: Path, room: int) -> None:
    # The limit on the size of a file can be lowered only for good: in a process of its own.
    script = f"""
import resource, signal, sys
from pathlib import Path
import numpy as np, pandas as pd
from fedsca_pipeline.data.preprocessing.array_writer import ArraysWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
manifest = pd.DataFrame({{"row": range(50), "image": "a", "split": "train"}})
try:
    with ArraysWriter(Path(sys.argv[1]), "north", {SIDE}) as writer:
        for row in range(50):
            writer.append(np.ones((3, 16, 16), np.uint8), np.ones((16, 16), np.uint8))
        writer.finish(list(range(50)), manifest)
except OSError as error:
    print(error.filename)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True, env=environment
    )

    assert Path(done.stdout.strip()).name == "north.safetensors"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
