"""One sample of a source: the files of an image and its mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsca_pipeline.data.importers.masks import Label
from fedsca_pipeline.data.readers.common import BrokenSampleError


@dataclass(frozen=True)
class Sample:
    """The files of one image and of its mask, all below the source.

    Without mask files the image shows no foreground. ``fault`` says why the sample cannot be used; names from the
    source stand in its quoted part only. ``item`` is the row or frame of files that hold many images. ``label`` reads
    the mask; None: the importer's label does.
    """

    site: str
    stem: str
    subject: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    fault: BrokenSampleError | None = None
    item: int | None = None
    label: Label | None = None
