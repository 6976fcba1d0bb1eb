"""Optic disc and cup of REFUGE, ORIGA, G1020 and Drishti-GS: one site per data set, two for REFUGE.

As published, REFUGE has BMP masks of 0 (cup), 128 (rim) and 255 (background), ORIGA MATLAB files, G1020 LabelMe
polygons, and Drishti-GS a soft map of four experts for disc and for cup, which is cut at one half. Collections store
ORIGA, G1020 and REFUGE as PNG of 0, 1 (rim) and 2 (cup).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import (
    file_a_class,
    from_files,
    polygons,
    seen_values,
    stored_values,
    to_classes,
)
from fedsca_pipeline.data.readers.common import UNREADABLE, unreadable, whole_numbers

_NUMBERED = {0: 0, 1: 1, 2: 2}
_PAINTED = seen_values({255: 0, 128: 1, 0: 2})
_CAMERAS = {"train": "REFUGE-Zeiss", "val": "REFUGE-Canon", "test": "REFUGE-Canon"}


def labelme(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and corners, float [N, 2] of x and y, of the shapes in a LabelMe JSON file.

    Raises:
        BrokenSampleError: it is not one.
    """
    try:
        for shape in json.loads(path.read_bytes())["shapes"]:
            yield str(shape["label"]), np.array(shape["points"], float).reshape(-1, 2)
    except UNREADABLE as error:
        raise unreadable(error) from error


def _matlab(path: Path, _: object) -> np.ndarray:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        values = np.asarray(loadmat(path, variable_names=["mask"])["mask"])
    except (MatReadError, *UNREADABLE) as error:
        raise unreadable(error) from error
    return to_classes(whole_numbers(values), _NUMBERED)


IMPORTER = Importer(
    title="Fundus, optic disc and cup (REFUGE, ORIGA, G1020, Drishti-GS)",
    licence="research only, each set under terms of its own (docs/importing.md)",
    classes=("rim", "cup"),
    label=stored_values(_NUMBERED),
    patterns=(
        Patterns(
            "**/Training400/**/{stem}.jpg",
            "**/Annotation-Training400/**/Disc_Cup_Masks/**/{stem}.bmp",
            site="REFUGE-Zeiss",
            label=_PAINTED,
        ),
        Patterns(
            "**/REFUGE-Validation400/**/{stem}.jpg",
            "**/REFUGE-Validation400-GT/**/Disc_Cup_Masks/**/{stem}.bmp",
            site="REFUGE-Canon",
            label=_PAINTED,
        ),
        Patterns(
            "**/Test400/**/{stem}.jpg",
            "**/REFUGE-Test-GT/**/Disc_Cup_Masks/**/{stem}.bmp",
            site="REFUGE-Canon",
            label=_PAINTED,
        ),
        *(
            Patterns(
                f"**/REFUGE2/{part}/images/{{stem}}.jpg",
                f"**/REFUGE2/{part}/mask/{{stem}}.{suffix}",
                site=site,
                label=_PAINTED,
            )
            for part, site in _CAMERAS.items()
            for suffix in ("bmp", "png")
        ),
        *(
            Patterns(f"**/REFUGE/{part}/Images/{{stem}}.jpg", f"**/REFUGE/{part}/Masks/{{stem}}.png", site=site)
            for part, site in _CAMERAS.items()
        ),
        Patterns("**/ORIGA/Images/{stem}.jpg", "**/ORIGA/Masks/{stem}.png", site="ORIGA"),
        Patterns(
            "**/ORIGA/Images/{stem}.jpg",
            "**/ORIGA/Semi-automatic-annotations*/{stem}.mat",
            site="ORIGA",
            label=from_files(_matlab),
        ),
        Patterns("**/G1020/Images/{stem}.jpg", "**/G1020/Masks/{stem}.png", site="G1020"),
        Patterns(
            "**/G1020/Images/{stem}.jpg",
            "**/G1020/Images/{stem}.json",
            site="G1020",
            label=polygons(labelme, {"discloc": 0, "disc": 1, "cup": 2}),
        ),
        Patterns(
            "**/{part}/Images/**/drishtiGS_{number}.png",
            "**/drishtiGS_{number}/SoftMap/drishtiGS_{number}_*.png",
            site="Drishti-GS",
            stem="drishtiGS_{number}",
            subject="drishtiGS_{number}",
            joined=True,
            label=file_a_class({"_ODsegSoftmap.png": 1, "_cupsegSoftmap.png": 2}),
        ),
    ),
)
