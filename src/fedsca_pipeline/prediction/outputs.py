"""The files that a prediction leaves: masks, overlays and probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.files import as_cells, atomic_path

# Okabe-Ito, as in all figures; they repeat after the last.
_COLOURS = np.array(
    [(240, 228, 66), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (213, 94, 0)], np.float32
)
_TINT = 0.3


def write_label_image(path: Path, labels: np.ndarray) -> None:
    """Write a label map uint8 [H, W] as a grey PNG of its numbers, atomically; 0 is background."""
    with atomic_path(path) as temporary:
        Image.fromarray(labels).save(temporary, "PNG")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically; see ``files.as_cell``."""
    with atomic_path(path) as temporary:
        as_cells(table).to_csv(temporary, index=False)


def write_overlay(path: Path, levels: np.ndarray, labels: np.ndarray) -> None:
    """Write an image with the outlines of its classes as a PNG, atomically.

    Args:
        path: of the PNG.
        levels: float or uint8 of 0..255, [H, W] or [H, W, 3].
        labels: uint8 [H, W], 0 = background, 1..K.
    """
    colours = np.asarray(levels, np.float32)
    colours = np.repeat(colours[..., None], 3, axis=2) if colours.ndim == 2 else colours.copy()
    own = _COLOURS[(labels - 1) % len(_COLOURS)]
    marked = labels > 0
    colours[marked] = (1 - _TINT) * colours[marked] + _TINT * own[marked]
    outline = marked & _edges(labels)
    colours[outline] = own[outline]
    with atomic_path(path) as temporary:
        Image.fromarray(np.rint(colours).astype(np.uint8)).save(temporary, "PNG")


def write_probability_image(path: Path, probabilities: np.ndarray) -> None:
    """Write probabilities float [K, H, W] as a TIFF of K pages float32, class 1 first, atomically."""
    import tifffile

    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            probabilities.astype(np.float32),
            photometric="minisblack",
            compression="deflate",
            metadata=None,
            software=False,
        )


def write_probability_volume(path: Path, probabilities: np.ndarray, volume: Volume) -> None:
    """Write probabilities [X, Y, Z, K] as NIfTI float32 on the volume's grid; of one class without the fourth axis."""
    values = probabilities[..., 0] if probabilities.shape[3] == 1 else probabilities
    write_nifti(path, values.astype(np.float32), volume.affine)


def _edges(labels: np.ndarray) -> np.ndarray:
    """Return where a pixel or one of its four neighbours has another label; the image's border is none."""
    edges = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        before, after = ([slice(None)] * 2 for _ in range(2))
        before[axis], after[axis] = slice(None, -1), slice(1, None)
        edges[tuple(before)] |= differs
        edges[tuple(after)] |= differs
    return edges
