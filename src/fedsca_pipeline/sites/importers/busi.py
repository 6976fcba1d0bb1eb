"""Breast ultrasound (BUSI): ``benign``, ``malignant``, ``normal``; further lesions of an image in ``_mask_1`` ..."""

from __future__ import annotations

from fedsca_pipeline.sites.importers.labels import two_values
from fedsca_pipeline.sites.importers.layout import Importer, Patterns

IMPORTER = Importer(
    title="Breast ultrasound images (BUSI)",
    licence="CC BY 4.0; cite Al-Dhabyani et al. 2020, Data in Brief",
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
    ),
)
