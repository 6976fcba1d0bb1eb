"""Data Science Bowl 2018, stage 1 (BBBC038): ``stage1_train/<id>/images/<id>.png``, one mask file per nucleus.

The data set names no lab. A site is an acquisition group: frame size, colour and background, as in docs/nuclei.md.
"""

from __future__ import annotations

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import two_values

# Of the 428 images of docs/nuclei.md, grey ones have a mean spread of 0 between channels and stained ones 12 and more;
# the brightest quarter has a spread of at most 14 before a white background and of 39 or more before a violet one.
_COLOURED, _VIOLET = 3.0, 25.0


def acquisition(image: np.ndarray) -> str:
    """Return the group of an image, uint8 [H, W] or [H, W, 3]: kind and frame width, such as ``fluo_256``."""
    width = image.shape[1]
    grey = image if image.ndim == 2 else image.mean(axis=2)
    if image.ndim == 2 or np.ptp(image, axis=2).mean() < _COLOURED:
        return f"{'fluo' if np.median(grey) < 128 else 'brightfield'}_{width}"
    background = np.median(image[grey >= np.percentile(grey, 75)], axis=0)
    return f"tissue_{'violet' if np.ptp(background) > _VIOLET else 'white'}_{width}"


IMPORTER = Importer(
    title="Data Science Bowl 2018, stage 1 (BBBC038)",
    licence="CC0 1.0; cite Caicedo et al. 2019, Nature Methods",
    classes=("nucleus",),
    label=two_values(),
    patterns=(
        Patterns(
            "**/{id}/images/{id}.png",
            "**/{id}/masks/*.png",
            site="all",
            stem="{id}",
            subject="{id}",
            joined=True,
        ),
    ),
    regroup=acquisition,
)
