"""Cardiac MRI of several centres and vendors (M&Ms): ``<code>/<code>_sa.nii.gz`` and ``_sa_gt``, films of volumes.

The table names the two labelled frames, end diastole and end systole; each becomes a volume. ``Unlabeled`` has empty
masks and is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.masks import Label, to_classes
from fedsca_pipeline.data.importers.pictures import Picture, blaming, read_nifti
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import TAKE_THE_TABLE, find_file, read_table
from fedsca_pipeline.data.readers.common import BrokenSampleError, whole_numbers
from fedsca_pipeline.data.readers.volume import check_grid
from fedsca_pipeline.errors import ConfigError

_COLUMNS: Mapping[str, str] = MappingProxyType({"centre": "Centre", "vendor": "Vendor"})
_CLASSES: Mapping[int, int] = MappingProxyType({0: 0, 1: 1, 2: 2, 3: 3})


def _frames(source: Path, films: list[Sample], *, column: str) -> Iterator[Sample]:
    path = find_file(source, "*M&Ms_Dataset_[Ii]nformation*.csv")
    table = read_table(path, "External code", (column, "ED", "ES"))
    for film in films:
        if "Unlabeled" in film.images[0].relative_to(source).parts:
            continue
        row = table.get(film.subject, {})
        site = row.get(column)
        for phase in ("ED", "ES"):
            frame = row.get(phase, "")
            known = bool(site) and frame.isdecimal()
            fault = BrokenSampleError(f"{path.name} has no {column} and frame {phase} of it", TAKE_THE_TABLE)
            yield replace(
                film,
                site=f"{column}_{site or 'unknown'}",
                stem=f"{film.stem}_{phase}",
                item=int(frame) if known else None,
                fault=film.fault or (None if known else fault),
            )


def read_frame(sample: Sample, _: Label | None) -> Picture:
    """Read one frame of a film and of its mask.

    Raises:
        UnusableError: one cannot be read, they differ in grid, or a value is no class.
    """
    (film,), (masks,) = sample.images, sample.masks
    with blaming(film):
        image = read_nifti(film, sample.item)
    with blaming(masks):
        mask = read_nifti(masks, sample.item)
        check_grid(mask, image)
        return Picture(image, to_classes(whole_numbers(mask.voxels), _CLASSES))


def configure(_: Path, options: Mapping[str, str], __: Watch) -> Importer:
    """Return the importer whose sites are centres, or vendors.

    Raises:
        ConfigError: it is neither.
    """
    by = str(options.get("site", "centre"))
    if by not in _COLUMNS:
        raise ConfigError(f"import_options.site: {by!r} is none of {', '.join(_COLUMNS)}")
    return replace(IMPORTER, refine=partial(_frames, column=_COLUMNS[by]))


IMPORTER = Importer(
    title="Cardiac MRI of several centres and vendors (M&Ms)",
    licence="research only, by agreement; cite Campello et al. 2021, IEEE TMI",
    classes=("left ventricle", "myocardium", "right ventricle"),
    patterns=(
        Patterns(
            "**/{code}/{code}_sa.nii.gz",
            "**/{code}/{code}_sa_gt.nii.gz",
            site="M-Ms",
            stem="{code}",
            subject="{code}",
        ),
    ),
    read=read_frame,
    options=("site",),
    configure=configure,
)
