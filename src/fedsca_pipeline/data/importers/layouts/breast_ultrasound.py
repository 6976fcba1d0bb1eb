"""Breast ultrasound, one site per data set: BUSI, BUS-BRA, BUS-UCLM, BrEaST, UDIAT (Dataset B).

BUSI stores further lesions of an image as ``_mask_1`` and so on. BUS-BRA names patients in the column ``Case`` of its
table, BUS-UCLM in the first part of a file name. BUS-UCLM shows benign lesions in green and malignant ones in red.
BrEaST has masks ``_tumor`` and ``_other1`` and so on; only the tumours are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import coloured, two_values
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import TAKE_THE_TABLE, find_file, read_table
from fedsca_pipeline.data.readers.common import BrokenSampleError


def _refined(source: Path, samples: list[Sample]) -> Iterator[Sample]:
    table = None
    for sample in samples:
        if sample.site != "BUS-BRA":
            # BrEaST's masks of other things look like images without a mask.
            if sample.site != "BrEaST" or "_other" not in sample.stem:
                yield sample
            continue
        table = table or read_table(find_file(source, "bus_data.csv"), "ID", ("Case",))
        case = table.get(sample.stem, {}).get("Case")
        fault = BrokenSampleError("bus_data.csv has no Case of it", TAKE_THE_TABLE, quoted=sample.stem)
        yield replace(sample, subject=case or sample.subject, fault=sample.fault or (None if case else fault))


IMPORTER = Importer(
    title="Breast ultrasound (BUSI, BUS-BRA, BUS-UCLM, BrEaST, UDIAT)",
    licence="BUSI, BUS-BRA, BUS-UCLM, BrEaST: CC BY 4.0; UDIAT: research, on request; cite each (docs/importing.md)",
    classes=("lesion",),
    label=two_values(),
    patterns=(
        Patterns(
            "**/{kind}/{kind} ({number}).png",
            "**/{kind}/{kind} ({number})_mask*.png",
            site="BUSI",
            stem="{kind}_{number}",
            subject="{kind}_{number}",
            joined=True,
        ),
        Patterns(
            "**/Images/bus_{number}.png",
            "**/Masks/mask_{number}.png",
            site="BUS-BRA",
            stem="bus_{number}",
            subject="bus_{number}",
        ),
        Patterns(
            "**/BUS-UCLM/images/{patient}_{number}.png",
            "**/BUS-UCLM/masks/{patient}_{number}.png",
            site="BUS-UCLM",
            stem="{patient}_{number}",
            subject="{patient}",
            label=coloured(),
        ),
        Patterns(
            "**/BrEaST-Lesions_USG-images_and_masks*/case{number}.png",
            "**/BrEaST-Lesions_USG-images_and_masks*/case{number}_tumor*.png",
            site="BrEaST",
            stem="case{number}",
            subject="case{number}",
            joined=True,
        ),
        Patterns("**/original/{stem}.png", "**/GT/{stem}.png", site="UDIAT"),
    ),
    refine=_refined,
)
