"""Retinal vessels, one site per data set: DRIVE, STARE, CHASE_DB1, HRF, HRF-AV, LES-AV; the first of two observers."""

from __future__ import annotations

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import coloured, two_values

IMPORTER = Importer(
    title="Retinal vessels (DRIVE, STARE, CHASE_DB1, HRF, HRF-AV, LES-AV)",
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
        Patterns(
            "**/CHASE*/**/Image_{child:d}{eye:w}.jpg",
            "**/CHASE*/**/Image_{child:d}{eye:w}_1stHO.png",
            site="CHASE_DB1",
            stem="{child}{eye}",
            subject="{child}",
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
        # Divided into training and test, with arteries and veins in colours.
        *(
            Patterns(
                f"**/{site}/{{part}}/images/{{stem}}{image}",
                f"**/{site}/{{part}}/1st_manual/{{stem}}{mask}",
                site=site,
                label=coloured(),
            )
            for site in ("HRF-AV", "LES-AV")
            for image, mask in (
                ("_AVmanual.png", "_AVmanual.png"),
                *((suffix, ending) for suffix in (".png", ".jpg", ".tif") for ending in ("_AVmanual.png", ".png")),
            )
        ),
    ),
)
