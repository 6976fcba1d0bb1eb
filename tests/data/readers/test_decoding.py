"""Files that kill, stop or bloat their decoder are broken samples."""

from __future__ import annotations

import gzip
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.config import DecodeConfig
from fedsca_pipeline.data.readers import decoding
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.decoding import decode_ahead, decode_limits
from fedsca_pipeline.data.readers.images import decode_pixels, read_image
from fedsca_pipeline.data.readers.volumes import read_volume

_SLOPE = 112  # in a NIfTI header
MHA = """ObjectType = Image
NDims = {axes}
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = {matrix} 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 1 1 1
DimSize = 4 4 4
ElementType = MET_UCHAR
ElementDataFile = LOCAL
"""


def write_mha(path: Path, axes: str = "3", matrix: str = "1") -> Path:
    path.write_bytes(MHA.format(axes=axes, matrix=matrix).encode() + bytes(64))
    return path


def write_png(path: Path) -> Path:
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path)
    return path


@pytest.mark.parametrize(
    "header", [{"axes": "-1"}, {"axes": "99"}, {"matrix": "1e308"}, {"matrix": "nan"}, {"matrix": "inf"}], ids=str
)
def test_a_header_that_kills_or_stops_the_decoder_makes_a_broken_sample(tmp_path: Path, header: dict[str, str]) -> None:
    with decode_limits(DecodeConfig(seconds=2)), pytest.raises(BrokenSampleError) as broken:
        read_volume(write_mha(tmp_path / "a.mha", **header))

    assert broken.value.cure
    assert read_volume(write_mha(tmp_path / "b.mha")).shape == (4, 4, 4)


def test_a_decoder_that_crashes_is_named_and_the_next_file_is_read(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png")
    expected = read_image(path)
    child = decoding._child_of(os.getpid())._running()
    os.kill(child.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (child.pid, signal.SIGKILL))
    killer.start()

    with pytest.raises(BrokenSampleError, match="crashes its decoder \\(SIGKILL\\)"):
        read_image(path)

    killer.join()
    np.testing.assert_array_equal(read_image(path), expected)


def test_a_file_beyond_its_time_is_broken(tmp_path: Path) -> None:
    with decode_limits(DecodeConfig(seconds=0.01)), pytest.raises(BrokenSampleError, match=r"more than 0\.01 seconds"):
        # Noise takes longest to decode.
        noise = np.random.default_rng(0).integers(0, 255, (4000, 4000), np.uint8)
        Image.fromarray(noise).save(tmp_path / "a.png", compress_level=1)
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory")
def test_a_file_beyond_its_memory_is_broken(tmp_path: Path) -> None:
    # The file's 128 MiB, and 256 of scaled values, where its size promises no more than 256.
    content = bytearray(nibabel.Nifti1Image(np.zeros((512, 256, 256), np.float32), np.eye(4)).to_bytes())
    struct.pack_into("<2f", content, _SLOPE, 2.0, 1.0)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content, compresslevel=1))

    with decode_limits(DecodeConfig(memory=64)), pytest.raises(BrokenSampleError, match="too much memory") as broken:
        read_volume(tmp_path / "a.nii.gz")

    assert "preprocessing.decode.memory" in broken.value.cure
    assert read_volume(tmp_path / "a.nii.gz").voxels.max() == 1


def test_the_limits_hold_within_their_block_only() -> None:
    assert decoding._LIMITS.get() == (DecodeConfig().memory, DecodeConfig().seconds)
    with decode_limits(DecodeConfig(memory=100, seconds=5)):
        assert decoding._LIMITS.get() == (100, 5)
    assert decoding._LIMITS.get() == (1024, 60)


def test_an_answer_keeps_type_shape_and_order(tmp_path: Path) -> None:
    for pixels in (np.zeros((3, 5), np.uint8), np.full((2, 4, 3), 7, np.uint8), np.eye(4, dtype=bool)):
        Image.fromarray(pixels).save(tmp_path / "a.png")
        here = decode_pixels.__wrapped__(tmp_path / "a.png", False)  # type: ignore[attr-defined]  # functools.wraps sets it

        there = decode_pixels(tmp_path / "a.png", False)

        assert there.dtype == here.dtype
        np.testing.assert_array_equal(there, here)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three images that differ; together their answers are larger than a pipe."""
    paths = [tmp_path / f"{value}.png" for value in range(3)]
    for value, path in enumerate(paths):
        Image.fromarray(np.full((1500, 1500), value, np.uint8)).save(path)
    return paths


def first_pixels(paths: list[Path]) -> list[int]:
    return [int(decode_pixels(path, False)[0, 0]) for path in paths]


@pytest.mark.parametrize(
    ("announced", "asked"),
    [([0, 1, 2], [0, 1, 2]), ([0, 1, 2], [1, 2]), ([0, 1], [2, 0, 1]), ([1, 0], [0, 1]), ([0, 0], [0, 0]), ([0], [])],
)
def test_a_file_gets_its_own_answer_whatever_was_announced(
    files: list[Path], announced: list[int], asked: list[int]
) -> None:
    for number in announced:
        decode_ahead(decode_pixels, files[number], False)

    assert first_pixels([files[number] for number in asked]) == asked


def test_an_announced_file_is_decoded_once(files: list[Path]) -> None:
    first_pixels(files[:1])
    child = decoding._child_of(os.getpid())
    decode_ahead(decode_pixels, files[0], False)
    decode_ahead(decode_pixels, files[1], False)
    assert len(child._sent) == 2

    first_pixels(files[:1])

    assert len(child._sent) == 1
    first_pixels(files[1:2])
    assert not child._sent


@pytest.mark.parametrize("asked", [0, 1])
def test_a_death_is_told_of_the_file_that_caused_it(files: list[Path], asked: int) -> None:
    first_pixels(files)
    child = decoding._child_of(os.getpid())._running()
    os.kill(child.pid, signal.SIGSTOP)
    for path in files[:2]:
        decode_ahead(decode_pixels, path, False)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    decode_ahead(decode_pixels, files[2], False)

    if asked == 0:
        with pytest.raises(BrokenSampleError, match="crashes its decoder"):
            decode_pixels(files[0], False)

    assert first_pixels(files[1:]) == [1, 2]


def test_an_announced_file_that_is_broken_or_gone_is_told_when_it_is_asked_for(
    files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"none")
    for name in ("broken.png", "gone.png", "0.png"):
        decode_ahead(decode_pixels, tmp_path / name, False)

    for name in ("broken.png", "gone.png"):
        with pytest.raises(BrokenSampleError):
            decode_pixels(tmp_path / name, False)
    assert first_pixels(files) == [0, 1, 2]


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png")
    script = (
        "import os, pathlib, sys; from fedsca_pipeline.data.readers import decoding, images;"
        "images.read_image(pathlib.Path(sys.argv[1]));"
        "print(decoding._child_of(os.getpid())._running().pid, flush=True); os.kill(os.getpid(), 9)"
    )
    parent = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)

    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(parent.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)

    assert not Path(f"/proc/{int(parent.stdout)}").exists()
