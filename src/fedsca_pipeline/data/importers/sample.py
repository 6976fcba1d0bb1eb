"""One sample of a source: the files of an image and its mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedsca_pipeline.data.importers.masks import Label


@dataclass(frozen=True)
class Sample:
    """The files of one image and those that make its mask, all below the source.

    No mask file is an image without foreground, unless ``fault``, a reason and a cure, says why it cannot be used.
    ``item`` is the row or frame of files that hold many images. ``label`` reads the mask where it is not the
    importer's that does.
    """

    site: str
    stem: str
    subject: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    fault: tuple[str, str] | None = None
    item: int | None = None
    label: Label | None = None
