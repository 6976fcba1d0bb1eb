"""Colonoscopy polyps, one site per data set: Kvasir-SEG, CVC-ClinicDB, CVC-ColonDB, ETIS-LaribPolypDB, CVC-300.

Masks have two values, and some are JPEG. No file names the patient of a frame. ``metadata.csv`` of CVC-ClinicDB names
the sequence, if it is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import two_values
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import TAKE_THE_TABLE, check_inside, read_table
from fedsca_pipeline.data.readers.common import BrokenSampleError

_SETS = ("CVC-ColonDB", "ETIS-LaribPolypDB", "CVC-300", "CVC-ClinicDB")
_TABLE = "metadata.csv"


def _with_sequences(source: Path, samples: list[Sample]) -> Iterator[Sample]:
    tables: dict[Path, dict[str, str]] = {}
    for sample in samples:
        table = next((folder for folder in sample.images[0].parents if folder.name == "CVC-ClinicDB"), source) / _TABLE
        if sample.site != "CVC-ClinicDB" or not table.is_file():
            yield sample
            continue
        if table not in tables:
            check_inside(source, table)
            rows = read_table(table, "png_image_path", ("sequence_id",))
            tables[table] = {PurePosixPath(name).stem: row["sequence_id"] for name, row in rows.items()}
        sequence = tables[table].get(sample.stem)
        fault = BrokenSampleError(f"{_TABLE} has no sequence_id of it", f"{TAKE_THE_TABLE}, or delete it")
        yield replace(
            sample,
            subject=f"sequence_{sequence}" if sequence else sample.subject,
            fault=sample.fault or (None if sequence else fault),
        )


IMPORTER = Importer(
    title="Colonoscopy polyps (Kvasir-SEG, CVC-ClinicDB, CVC-ColonDB, ETIS-LaribPolypDB, CVC-300)",
    licence="research and education only, each set under terms of its own (docs/importing.md)",
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
    refine=_with_sequences,
)
