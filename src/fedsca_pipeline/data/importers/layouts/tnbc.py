"""Triple-negative breast cancer nuclei (TNBC): ``Slide_<patient>/<image>.png``, ``GT_<patient>/<image>.png``."""

from __future__ import annotations

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import objects

IMPORTER = Importer(
    title="Nuclei of triple-negative breast cancer (TNBC)",
    licence="CC BY 4.0; cite Naylor et al. 2018, IEEE TMI",
    classes=("nucleus",),
    label=objects(),
    patterns=(
        Patterns(
            "**/Slide_{patient}/{stem}.png",
            "**/GT_{patient}/{stem}.png",
            site="TNBC",
            subject="{patient}",
        ),
    ),
)
