"""A site's arrays to disk, row by row; one row is in memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import pandas as pd
from safetensors import safe_open

from fedsca_pipeline.data.manifest import manifest_digest
from fedsca_pipeline.files import move, name_the_file

# Bytes for length and header, so that rows can be written before their number is known. The format allows a header to
# end in blanks: https://huggingface.co/docs/safetensors/index#format.
_LENGTH, _START = 8, 512
# Bytes of masks that are buffered in memory; more are buffered on disk.
_FEW = 2**22


class ArraysFile(Mapping[str, np.ndarray]):
    """A finished file of arrays, to be moved to its place; otherwise it is deleted with this object.

    As a mapping, each look-up reads the whole named array from the file.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._names = path, tuple(names)
        # At the interpreter's exit too.
        self._clean = weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)

    def move_to(self, path: Path) -> None:
        """Rename the file to ``path`` on the same disk, atomically. Missing parent folders are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        move(self._path, path)
        self._path = path
        self._clean()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="numpy") as file:
            array: np.ndarray = file.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ArraysWriter:
    """Writes the file that ``SiteArrays`` reads, row by row; a context manager.

    The file grows in a hidden folder within ``folder``, which is removed if the block fails. Images are written in
    place. Masks follow all images in the file, so they are buffered: first in memory, then in a second file.

    Args:
        folder: on the disk where the file will be.
        name: of the site.
        side: S, of the padded square in pixels.
    """

    def __init__(self, folder: Path, name: str, side: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}.", suffix=".partial"))
        self._path = workshop / f"{name}.safetensors"
        self._image = np.zeros((3, side, side), np.uint8)
        self._mask = np.zeros((side, side), np.uint8)
        self._sizes: list[tuple[int, int]] = []
        self._images: IO[bytes] = self._path.open("w+b")
        self._masks: IO[bytes] = tempfile.SpooledTemporaryFile(_FEW, dir=str(workshop))  # noqa: SIM115 - __exit__ closes it
        self._images.seek(_START)

    def __enter__(self) -> ArraysWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._images, self._masks):
            # After a failed write, closing fails for the same reason, which is already raised.
            with suppress(OSError):
                file.close()
        if error is not None:
            shutil.rmtree(self._path.parent)

    def append(self, image: np.ndarray, mask: np.ndarray) -> None:
        """Write the next row: image uint8 [3, height, width] and mask uint8 [height, width], neither above S.

        Raises:
            OSError: the disk is full; it names the file.
        """
        height, width = mask.shape
        self._image[...], self._mask[...] = 0, 0
        self._image[:, :height, :width] = image
        self._mask[:height, :width] = mask
        with name_the_file(self._path):
            self._images.write(self._image.data)
            self._masks.write(self._mask.data)
        self._sizes.append((height, width))

    def finish(self, keep: Sequence[int], manifest: pd.DataFrame) -> ArraysFile:
        """Return the finished file, with the rows ``keep`` (ascending) only, and the digest of ``manifest``.

        Raises:
            OSError: the disk is full; it names the file.
        """
        with name_the_file(self._path):
            if len(keep) < len(self._sizes):
                # Rows only move towards the start, so each is read before it is overwritten.
                for place, row in enumerate(keep):
                    image = _row(self._images, _START, row, self._image.nbytes)
                    self._images.seek(_START + place * self._image.nbytes)
                    self._images.write(image)
            self._images.seek(_START + len(keep) * self._image.nbytes)
            for row in keep:
                self._images.write(_row(self._masks, 0, row, self._mask.nbytes))
            sizes = np.array([self._sizes[row] for row in keep], "<i4").reshape(-1, 2)
            described = manifest_digest(manifest)
            self._images.write(sizes.tobytes() + described.tobytes())
            self._images.truncate()
            shapes = {
                "images": ("U8", (len(keep), *self._image.shape)),
                "masks": ("U8", (len(keep), *self._mask.shape)),
                "sizes": ("I32", sizes.shape),
                "manifest": ("U8", described.shape),
            }
            self._images.seek(0)
            self._images.write(_header(shapes))
            self._images.flush()
            os.fsync(self._images.fileno())
        return ArraysFile(self._path, list(shapes))


def _row(file: IO[bytes], start: int, row: int, size: int) -> bytes:
    file.seek(start + row * size)
    return file.read(size)


def _header(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return length and header of a safetensors file whose arrays follow one another in this order."""
    bytes_each, entries, end = {"U8": 1, "I32": 4}, {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + bytes_each[dtype] * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    room = _START - _LENGTH
    return room.to_bytes(_LENGTH, "little") + json.dumps(entries).encode().ljust(room)
