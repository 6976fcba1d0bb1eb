"""Colonoscopy polyps, a site a data set: Kvasir-SEG, CVC-ClinicDB, CVC-ColonDB, ETIS-LaribPolypDB, CVC-300.

Masks are two-valued, some of them JPEG. Which frames are of one patient is published for none of these in its files.
"""

from __future__ import annotations

from fedsca_pipeline.sites.importers.labels import two_values
from fedsca_pipeline.sites.importers.layout import Importer, Patterns

_SETS = ("CVC-ColonDB", "ETIS-LaribPolypDB", "CVC-300", "CVC-ClinicDB")

IMPORTER = Importer(
    title="Colonoscopy polyps (Kvasir-SEG, CVC-ClinicDB, CVC-ColonDB, ETIS-LaribPolypDB, CVC-300)",
    licence="research and education only, each set under terms of its own (docs/benchmarks.md)",
    classes=("polyp",),
    label=two_values(),
    patterns=(
        Patterns("**/Kvasir-SEG/images/{stem}.jpg", "**/Kvasir-SEG/masks/{stem}.jpg", site="Kvasir-SEG"),
        Patterns("**/CVC-ClinicDB/Original/{stem}.tif", "**/CVC-ClinicDB/Ground Truth/{stem}.tif", site="CVC-ClinicDB"),
        Patterns(
            "**/CVC-ClinicDB/PNG/Original/{stem}.png",
            "**/CVC-ClinicDB/PNG/Ground Truth/{stem}.png",
            site="CVC-ClinicDB",
        ),
        *(Patterns(f"**/{name}/images/{{stem}}.png", f"**/{name}/masks/{{stem}}.png", site=name) for name in _SETS),
        Patterns("**/Kvasir/images/{stem}.png", "**/Kvasir/masks/{stem}.png", site="Kvasir-SEG"),
    ),
)
