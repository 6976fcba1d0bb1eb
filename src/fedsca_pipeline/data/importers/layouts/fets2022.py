"""Brain tumours of FeTS 2022, one site per partition: ``<subject>/<subject>_{t1,t1ce,t2,flair,seg}.nii.gz``.

``partitioning_1.csv`` has the institutions, ``partitioning_2.csv`` some of them divided by tumour size. The four
modalities become one volume, in the order of ``MODALITIES``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.masks import Label, stored_values
from fedsca_pipeline.data.importers.pictures import Picture, blaming, read_nifti
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import TAKE_THE_TABLE, find_file, read_table
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.volume import Volume, check_grid
from fedsca_pipeline.errors import ConfigError

MODALITIES = ("t1", "t1ce", "t2", "flair")

_PARTITIONINGS = ("1", "2")


def _partitioned(source: Path, samples: list[Sample], *, partitioning: str) -> Iterator[Sample]:
    table = read_table(find_file(source, f"partitioning_{partitioning}.csv"), "Subject_ID", ("Partition_ID",))
    for sample in samples:
        first = sample.images[0]
        images = tuple(first.with_name(f"{sample.subject}_{modality}.nii.gz") for modality in MODALITIES)
        partition = table.get(sample.subject, {}).get("Partition_ID")
        fault = sample.fault
        if missing := [image.name for image in images if not image.is_file()]:
            fault = BrokenSampleError("a modality is missing", "unpack the whole data set", quoted=missing[0])
        elif not partition:
            fault = BrokenSampleError(f"partitioning_{partitioning}.csv does not name it", TAKE_THE_TABLE)
        yield replace(sample, site=f"Partition_{(partition or 'none').zfill(2)}", images=images, fault=fault)


def read_modalities(sample: Sample, label: Label) -> Picture:
    """Stack the files of a sample as [X, Y, Z, M], in the number type that holds them all.

    Raises:
        UnusableError: one cannot be read, or lies on another grid than the first.
    """
    volumes = []
    for file in sample.images:
        with blaming(file):
            volumes.append(read_nifti(file))
            check_grid(volumes[-1], volumes[0])
    image = Volume(np.stack([volume.voxels for volume in volumes], axis=-1), volumes[0].affine)
    with blaming(sample.masks[0]):
        return Picture(image, label(sample.masks, image))


def configure(_: Path, options: Mapping[str, str], __: Watch) -> Importer:
    """Return the importer with the chosen table of partitions.

    Raises:
        ConfigError: there is no such table.
    """
    partitioning = str(options.get("partitioning", "1"))
    if partitioning not in _PARTITIONINGS:
        raise ConfigError(f"import_options.partitioning: {partitioning!r} is none of {', '.join(_PARTITIONINGS)}")
    return replace(IMPORTER, refine=partial(_partitioned, partitioning=partitioning))


IMPORTER = Importer(
    title="Brain tumours (FeTS 2022)",
    licence="research only, by agreement on Synapse; cite FeTS 2022 and BraTS (docs/importing.md)",
    classes=("necrotic core", "oedema", "enhancing tumour"),
    label=stored_values({0: 0, 1: 1, 2: 2, 4: 3}),
    patterns=(
        Patterns(
            "**/{subject}/{subject}_t1.nii.gz",
            "**/{subject}/{subject}_seg.nii.gz",
            site="FeTS2022",
            stem="{subject}",
            subject="{subject}",
        ),
    ),
    read=read_modalities,
    modalities=MODALITIES,
    options=("partitioning",),
    configure=configure,
)
