"""Optic disc and cup of DoFE and FedDG: ``Domain?/{train,test}/ROIs/{image,mask}``, four centres.

Masks are grey, palette or RGB files of 0 (cup), 128 (rim) and 255 (background).
"""

from __future__ import annotations

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import seen_values

IMPORTER = Importer(
    title="Fundus, optic disc and cup (DoFE, FedDG)",
    licence="research only; the four sources' terms hold (docs/importing.md)",
    classes=("rim", "cup"),
    label=seen_values({255: 0, 128: 1, 0: 2}),
    patterns=tuple(
        Patterns(
            f"**/{{site}}/{{part}}/ROIs/image/{{stem}}.{suffix}",
            f"**/{{site}}/{{part}}/ROIs/mask/{{stem}}.{suffix}",
            stem="{part}-{stem}",
        )
        for suffix in ("png", "bmp", "tif")
    ),
)
