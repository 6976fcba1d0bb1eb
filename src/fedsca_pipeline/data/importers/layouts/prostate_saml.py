"""Prostate MRI of six sites (SAML): ``<site>/Case??.nii.gz`` and ``_segmentation``, which is ``_Segmentation`` in BMC.

Masks of two of the sources tell the peripheral zone and the central gland apart; here both are the prostate.
"""

from __future__ import annotations

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import stored_values

IMPORTER = Importer(
    title="Prostate MRI of six sites (SAML)",
    licence="research only; the terms of NCI-ISBI 2013, I2CVB and PROMISE12 hold (docs/importing.md)",
    classes=("prostate",),
    label=stored_values({0: 0, 1: 1, 2: 1}),
    patterns=(
        Patterns(
            "**/{site}/Case{number}.nii.gz",
            "**/{site}/Case{number}_*egmentation.nii.gz",
            stem="Case{number}",
            # Every site numbers its own cases.
            subject="{site}-Case{number}",
        ),
    ),
)
