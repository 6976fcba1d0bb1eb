"""One site from raw folder to manifest, arrays and data report (docs/data.md). Nothing raw is modified."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.data.manifest import MANIFEST_DTYPES
from fedsca_pipeline.data.preprocessing.array_writer import ArraysFile, ArraysWriter
from fedsca_pipeline.data.preprocessing.report import site_report
from fedsca_pipeline.data.preprocessing.samples import Sample, read_samples
from fedsca_pipeline.data.preprocessing.selection import Selection, select_samples
from fedsca_pipeline.data.site_folder.identifiers import open_site
from fedsca_pipeline.data.site_folder.pairing import Broken, by_fault, pair_files
from fedsca_pipeline.errors import DataError, counted
from fedsca_pipeline.files import remove_partial_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedSite:
    """One site, ready for training.

    ``manifest`` has one row per image, or slice of a volume, in stem order, with the columns of ``MANIFEST_DTYPES``:
    ``split`` is train, validation, test or unused; ``classes`` is a JSON list of the classes in the resized mask;
    ``height`` and ``width`` are the valid area in the arrays; paths are relative to the site folder; ``volume`` is the
    stem of a slice's volume, "" for a flat image, whose ``slice`` is -1. ``arrays`` is a finished file of ``images``
    uint8 [N, 3, S, S], ``masks`` uint8 [N, S, S] (0 background, 1..K, padding 0), ``sizes`` int32 [N, 2] and
    ``manifest`` uint8 [32], the manifest's digest. ``report`` is JSON-able.
    """

    manifest: pd.DataFrame
    arrays: ArraysFile
    report: dict[str, Any]


def prepare_site(
    raw: Path,
    site: str,
    config: PreprocessingConfig,
    seed: int,
    previous_manifest: pd.DataFrame | None = None,
    *,
    scratch: Path | None = None,
) -> PreparedSite:
    """Read, check, split and resize one site's images, one image or volume in memory, and log the outcome.

    The arrays grow in a hidden folder within ``scratch``, on the disk where they will be. Default: the system's folder
    for temporary files.

    Subjects in ``previous_manifest`` keep their split while seed, split settings and group rule stay the same. With
    other settings the split is drawn again, and the report warns of it.

    Raises:
        OSError: the disk is full.
        DataError: broken files with ``on_bad_sample: fail``, too few usable images, only empty masks, no images or
            masks folder, DICOM files or hidden names (``open_site``), a wrong ``site.yml``, or a split without images.
            The message names them and the cure.
    """
    folder = raw / site
    site_file = open_site(folder)
    if scratch is not None:
        # A killed command may have left a partial file as large as all arrays of this site.
        remove_partial_files(scratch, f"{site}.*")
    pairs, broken = pair_files(folder)
    found = len(pairs) + sum(entry.file.startswith("images/") for entry in broken)

    samples: list[Sample] = []
    with ArraysWriter(scratch or Path(tempfile.gettempdir()), site, config.image_size) as writer:
        for sample, planes in read_samples(folder, pairs, site_file, config, broken):
            for image, mask in planes:
                writer.append(image, mask)
            samples.append(sample)

        selection = select_samples(site, samples, broken, site_file, config, seed, previous_manifest)
        if selection.refusals:
            raise DataError(selection.refusals[0])
        rows = _array_rows(samples, selection)
        samples = [samples[row] for row in selection.rows]
        manifest = _manifest(site, samples, selection)
        arrays = writer.finish(rows, manifest)
    report = site_report(raw, site, found, samples, broken, selection, site_file, config, seed)
    _log_outcome(site, report["counts"]["used"], broken, selection.alerts)
    return PreparedSite(manifest, arrays, report)


def _log_outcome(site: str, used: int, broken: Sequence[Broken], alerts: Sequence[str]) -> None:
    logger.info("%s: %s, %d broken", site, counted(used, "image"), len(broken))
    for fault in by_fault(broken):
        logger.warning("%s: %s: %s (left out; %s)", site, fault.file, fault.reason, fault.cure)
    if broken:
        logger.warning("%s: each file is listed in the site's report.json below 02_intermediate", site)
    for alert in alerts:
        logger.warning("%s: %s", site, alert)


def _array_rows(samples: Sequence[Sample], selection: Selection) -> list[int]:
    """Return the rows to keep, among the rows that all samples wrote one after the other."""
    starts = np.cumsum([0, *(len(sample.planes) for sample in samples)])
    return [int(starts[row]) + plane for row in selection.rows for plane in selection.planes[samples[row].pair.image]]


def _manifest(site: str, samples: Sequence[Sample], selection: Selection) -> pd.DataFrame:
    kept = [(sample, plane) for sample in samples for plane in selection.planes[sample.pair.image]]
    rows = [
        {
            "site": site,
            "subject": sample.subject,
            "image": sample.pair.image,
            "mask": sample.pair.mask,
            "split": selection.splits[sample.pair.image],
            "label_map": json.dumps(sample.label_map),
            "classes": json.dumps(sample.planes[plane]),
            "sha256": sample.sha256,
            "mask_sha256": sample.mask_sha256,
            "height": sample.fitted[0],
            "width": sample.fitted[1],
            "original_height": sample.original[0],
            "original_width": sample.original[1],
            "volume": sample.pair.stem if sample.is_volume else "",
            "slice": plane if sample.is_volume else -1,
            "row": row,
            "split_settings": selection.settings,
        }
        for row, (sample, plane) in enumerate(kept)
    ]
    # Typed column by column: the whole frame at once takes several times as long.
    return pd.DataFrame({name: pd.array([row[name] for row in rows], dtype) for name, dtype in MANIFEST_DTYPES.items()})
