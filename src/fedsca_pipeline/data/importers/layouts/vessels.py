"""Retinal vessels, a site a data set: DRIVE, STARE, CHASE_DB1, HRF, LES-AV; of two observers the first."""

from __future__ import annotations

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import two_values

IMPORTER = Importer(
    title="Retinal vessels (DRIVE, STARE, CHASE_DB1, HRF, LES-AV)",
    licence="research only, each set under terms of its own (docs/importing.md)",
    classes=("vessel",),
    label=two_values(),
    patterns=(
        Patterns(
            "**/DRIVE/{part}/images/{number}_{part}.tif",
            "**/DRIVE/{part}/1st_manual/{number}_manual1.gif",
            site="DRIVE",
            stem="{number}_{part}",
            subject="{number}",
        ),
        Patterns("**/STARE/stare-images/{stem}.ppm", "**/STARE/labels-ah/{stem}.ah.ppm", site="STARE"),
        *(
            Patterns(
                f"**/CHASE*DB1/**/Image_{{number}}{eye}.jpg",
                f"**/CHASE*DB1/**/Image_{{number}}{eye}_1stHO.png",
                site="CHASE_DB1",
                stem=f"{{number}}{eye}",
                subject="{number}",
            )
            for eye in "LR"
        ),
        *(
            Patterns(
                f"**/HRF/images/{{number}}_{{kind}}.{suffix}",
                "**/HRF/manual1/{number}_{kind}.tif",
                site="HRF",
                stem="{number}_{kind}",
                subject="{number}_{kind}",
            )
            for suffix in ("jpg", "JPG")
        ),
        Patterns("**/LES-AV/images/{stem}.png", "**/LES-AV/vessel-segmentations/{stem}.png", site="LES-AV"),
    ),
)
