"""Nuclei of 19 tissues (PanNuke), a site per tissue: ``images/<fold>/{images,types}.npy``, ``masks/<fold>/masks.npy``.

The data set names no patient. The arrays have gigabytes each, so they are memory-mapped and read image by image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import Label
from fedsca_pipeline.data.importers.pictures import Picture, blaming
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import check_inside
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.errors import DataError

_CLASSES = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")


def _rows(source: Path, folds: list[Sample]) -> Iterator[Sample]:
    for fold in folds:
        if fold.fault is not None:
            yield fold
            continue
        images, types, masks = fold.images[0], fold.images[0].with_name("types.npy"), fold.masks[0]
        for file in (images, types, masks):
            check_inside(source, file)
        arrays = {file: _mapped(file) for file in (images, types, masks)}
        for file, wanted in ((images, (256, 256, 3)), (types, ()), (masks, (256, 256, 6))):
            if arrays[file].shape != (len(arrays[images]), *wanted):
                raise DataError(
                    f"{file}: an array of shape {arrays[file].shape}, beside {len(arrays[images])} images; "
                    "take the files of one fold"
                )
        for row, tissue in enumerate(arrays[types]):
            stem = f"{fold.stem}_{row:04d}"
            yield replace(fold, site=str(tissue), stem=stem, subject=stem, item=row)


def _mapped(file: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{file}: not an array of numbers or text ({' '.join(str(error).split())[:200]}); copy the file again"
        ) from error
    return array


def read_row(sample: Sample, _: Label | None) -> Picture:
    """Read one row of a fold's arrays: an RGB image of whole numbers, and a channel of numbered nuclei a class.

    Where classes overlap, the higher one is on top.

    Raises:
        UnusableError: values are not whole numbers of 0 to 255.
    """
    (images,), (masks,) = sample.images, sample.masks
    with blaming(images):
        pixels = np.asarray(_mapped(images)[sample.item])
        if not (np.isfinite(pixels).all() and (pixels == np.clip(np.rint(pixels), 0, 255)).all()):
            raise BrokenSampleError(f"row {sample.item} is not of whole numbers of 0 to 255", "copy the file again")
    channels = np.asarray(_mapped(masks)[sample.item, ..., : len(_CLASSES)]) > 0
    mask = (channels * np.arange(1, len(_CLASSES) + 1)).max(axis=-1)
    return Picture(pixels.astype(np.uint8), mask.astype(np.uint8))


IMPORTER = Importer(
    title="Nuclei of 19 tissues (PanNuke)",
    licence="CC BY-NC-SA 4.0; cite Gamper et al. 2019 and 2020",
    classes=_CLASSES,
    patterns=(
        Patterns(
            "**/images/{fold}/images.npy",
            "**/masks/{fold}/masks.npy",
            site="PanNuke",
            stem="{fold}",
            subject="{fold}",
        ),
    ),
    refine=_rows,
    read=read_row,
)
