"""Cardiac MRI of several centres and vendors (M&Ms): ``<code>/<code>_sa.nii.gz`` and ``_sa_gt``, films of volumes.

The table says which two frames are labelled, end diastole and end systole; each becomes a volume. What lies in
``Unlabeled`` has masks without content, and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from fedsca_pipeline.errors import ConfigError, DataError
from fedsca_pipeline.sites.importers.labels import Label, objects, to_classes
from fedsca_pipeline.sites.importers.layout import Importer, Patterns, Sample
from fedsca_pipeline.sites.importers.pictures import Picture, blaming, read_nifti
from fedsca_pipeline.sites.importers.tables import find_file, read_table
from fedsca_pipeline.sites.readers import whole_numbers
from fedsca_pipeline.sites.volumes import check_grid

_COLUMNS: Mapping[str, str] = MappingProxyType({"centre": "Centre", "vendor": "Vendor"})
_CLASSES: Mapping[int, int] = MappingProxyType({0: 0, 1: 1, 2: 2, 3: 3})


def _frames(source: Path, films: list[Sample], *, column: str) -> Iterator[Sample]:
    path = find_file(source, "*M&Ms_Dataset_[Ii]nformation*.csv")
    table = read_table(path, "External code", (column, "ED", "ES"))
    for film in films:
        if "Unlabeled" in film.images[0].relative_to(source).parts:
            continue
        if film.subject not in table:
            fault = f"{path.name} does not name it", "take the table that came with the images"
            yield replace(film, fault=film.fault or fault)
            continue
        row = table[film.subject]
        for phase in ("ED", "ES"):
            if not row[phase].isdecimal():
                raise DataError(f"{path}: {phase} of {film.subject} is {row[phase]!r}, not the number of a frame")
            stem = f"{film.stem}_{phase}"
            yield replace(film, site=f"{column}_{row[column]}", stem=stem, item=int(row[phase]))


def read_frame(sample: Sample, _: Label) -> Picture:
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


def configure(_: Path, options: Mapping[str, str]) -> Importer:
    """Choose whether a site is a centre or a vendor.

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
    label=objects(),
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
