"""A site's cached arrays: one safetensors file, read row by row through a memory map."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open

from fedsca_pipeline.data.manifest import _LEARNED_FROM, classes_in, manifest_digest, sample_names
from fedsca_pipeline.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class Arrays(Protocol):
    """Images and masks in splits, read row by row: the data of a site for training and evaluation."""

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split, int64; empty if it has none."""
        ...

    def names(self, split: str) -> list[str]:
        """Return the image's stem, or ``<stem>#<slice>``, of each of ``rows(split)``."""
        ...

    def subjects(self, split: str) -> list[str]:
        """Return the subject of each of ``rows(split)``; a row without a name is its own subject."""
        ...

    def images(self, split: str) -> list[str]:
        """Return the image file of each of ``rows(split)``; all slices of a volume have the same."""
        ...

    def classes(self, *splits: str) -> tuple[int, ...]:
        """Return the sorted classes, of 1..K, in the masks of these splits. Default: all splits."""
        ...

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return these rows: images uint8 [B, 3, S, S], masks uint8 [B, S, S], and bool [B, S, S], False on padding."""
        ...


class SiteArrays:
    """Images, masks and valid sizes of one site, in manifest order.

    The file holds ``images`` uint8 [N, 3, S, S], ``masks`` uint8 [N, S, S] (0 background, 1..K) and ``sizes`` int32
    [N, 2] (valid height and width; the rest is padding), and ``manifest`` uint8 [32], the digest of its manifest.

    Raises:
        DataError: the file is missing, damaged, or not the one that this manifest describes.
    """

    def __init__(self, path: Path, manifest: pd.DataFrame) -> None:
        self._path = path
        self._splits = manifest["split"].to_numpy(dtype=object)
        self._rows = manifest["row"].to_numpy(dtype=np.int64)
        self._subjects = [str(subject) for subject in manifest["subject"]]
        # Only training and scoring need classes.
        self._classes = manifest.get("classes")
        self._names = sample_names(manifest)
        self._images_of_rows = manifest["image"].tolist()
        try:
            self._file = safe_open(path, framework="numpy")
            self._images = self._file.get_slice("images")
            self._masks = self._file.get_slice("masks")
            self._sizes = self._file.get_tensor("sizes")
            described = self._file.get_tensor("manifest")
        except (OSError, SafetensorError) as error:
            raise self._unusable(str(error)) from error
        count, channels, side, width = self._images.get_shape()
        if channels != 3 or side != width or [count, side, side] != self._masks.get_shape():
            raise self._unusable("its shapes are not [N, 3, S, S] and [N, S, S]")
        if len(manifest) != count or sorted(self._rows) != list(range(count)):
            raise self._unusable(f"it holds {count} images, the manifest lists {len(manifest)}")
        if not np.array_equal(described, manifest_digest(manifest)):
            raise self._unusable("it belongs to another manifest")
        self._side = int(side)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def image_size(self) -> int:
        """S, the side of the padded square in pixels."""
        return self._side

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split, int64, in manifest order; empty if it has none."""
        rows: np.ndarray = self._rows[self._splits == split]
        return rows

    def subjects(self, split: str) -> list[str]:
        """Return the subject of each of ``rows(split)``."""
        return [subject for subject, own in zip(self._subjects, self._splits, strict=True) if own == split]

    def images(self, split: str) -> list[str]:
        """Return the image file of each of ``rows(split)``; all slices of a volume have the same."""
        return [image for image, own in zip(self._images_of_rows, self._splits, strict=True) if own == split]

    def files(self) -> list[list[int]]:
        """Return the rows of each image file, ordered by the first: one row, or all slices of a volume."""
        found: dict[str, list[int]] = {}
        for row, image in sorted(zip(self._rows.tolist(), self._images_of_rows, strict=True)):
            found.setdefault(image, []).append(row)
        return list(found.values())

    def names(self, split: str) -> list[str]:
        """Return the image's stem, or ``<stem>#<slice>``, of each of ``rows(split)``."""
        return [name for name, own in zip(self._names, self._splits, strict=True) if own == split]

    def classes(self, *splits: str) -> tuple[int, ...]:
        """Return the sorted classes, of 1..K, in the masks of these splits. Default: all splits.

        Raises:
            DataError: an older version wrote the manifest, without classes.
        """
        if self._classes is None:
            raise self._unusable("its manifest has no column classes")
        return classes_in(self._classes[np.isin(self._splits, splits)] if splits else self._classes)

    def with_splits(self, splits: Mapping[str, Sequence[int]]) -> SiteArrays:
        """Return the same images in other splits, rows by split name; other rows are in no split."""
        found = copy.copy(self)
        named = {int(row): split for split, rows in splits.items() for row in rows}
        found._splits = np.array([named.get(int(row), "") for row in self._rows], dtype=object)
        return found

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return these rows, in this order; repeats are allowed.

        Returns:
            Images uint8 [B, 3, S, S], masks uint8 [B, S, S], and bool [B, S, S], False on padding.

        Raises:
            IndexError: a row is not in 0..N-1.
        """
        side = self._side
        images = np.empty((len(rows), 3, side, side), np.uint8)
        masks = np.empty((len(rows), side, side), np.uint8)
        valid = np.zeros((len(rows), side, side), bool)
        for index, row in enumerate(int(row) for row in rows):
            if not 0 <= row < len(self):
                raise IndexError(f"{self._path}: row {row} is not in 0..{len(self) - 1}")
            images[index] = self._images[row : row + 1][0]
            masks[index] = self._masks[row : row + 1][0]
            height, width = self._sizes[row]
            valid[index, :height, :width] = True
        return images, masks, valid

    def _unusable(self, why: str) -> DataError:
        return DataError(
            f"{self._path}: cached arrays cannot be used ({why}); run the preprocessing of this site again"
        )


class PooledArrays:
    """The images of several sites as one site; rows are numbered through, site after site in the given order."""

    def __init__(self, sites: Sequence[Arrays], lengths: Sequence[int]) -> None:
        self._sites = sites
        self._starts = np.cumsum([0, *lengths])

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split, int64; empty if it has none."""
        parts = [site.rows(split) + start for site, start in zip(self._sites, self._starts, strict=False)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def names(self, split: str) -> list[str]:
        """Return the image stem of each of ``rows(split)``; two sites may have the same."""
        return [name for site in self._sites for name in site.names(split)]

    def subjects(self, split: str) -> list[str]:
        """Return the subject of each of ``rows(split)``, site by site: no two sites share a subject."""
        return [f"{index}/{name}" for index, site in enumerate(self._sites) for name in site.subjects(split)]

    def images(self, split: str) -> list[str]:
        """Return the image file of each of ``rows(split)``, site by site."""
        return [f"{index}/{name}" for index, site in enumerate(self._sites) for name in site.images(split)]

    def classes(self, *splits: str) -> tuple[int, ...]:
        """Return the classes in the masks of these splits at any of the sites; see ``Arrays``."""
        return tuple(sorted({label for site in self._sites for label in site.classes(*splits)}))

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return these rows, in this order; see ``Arrays``. Without rows the image size is unknown: IndexError."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        parts = [self._sites[owner].batch([row - self._starts[owner]]) for owner, row in zip(owners, rows, strict=True)]
        if not parts:
            raise IndexError("no row to read")
        images, masks, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
        return images, masks, valid


def known_classes(data: Arrays, classes: int) -> tuple[int, ...]:
    """Return the classes that a site can learn: those in its training and validation masks.

    Default, if all these masks are empty: all of 1..``classes``.
    """
    return data.classes(*_LEARNED_FROM) or tuple(range(1, classes + 1))


def scored_classes(data: Arrays, classes: int) -> tuple[int, ...]:
    """Return the classes that a site is scored on: those in any of its masks. Default: all of 1..``classes``."""
    return data.classes() or tuple(range(1, classes + 1))
