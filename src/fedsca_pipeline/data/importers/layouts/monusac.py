"""Nuclei of four organs (MoNuSAC): ``<patient's slide>/<image>.tif`` with ImageScope outlines in ``<image>.xml``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fedsca_pipeline.data.importers.layout import Importer, Patterns
from fedsca_pipeline.data.importers.masks import polygons
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.readers.common import UNREADABLE, unreadable


def imagescope(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names and corners, float [N, 2] of x and y, of the regions in an Aperio ImageScope XML file.

    An annotation's name stands in its first attribute; its regions all have it.

    Raises:
        BrokenSampleError: it is not such a file.
    """
    try:
        # Expat fetches no entity from elsewhere and bounds how far those of the file expand.
        for annotation in ElementTree.parse(path).getroot().iter("Annotation"):  # noqa: S314
            attribute = annotation.find("Attributes/Attribute")
            name = attribute.get("Name", "") if attribute is not None else ""
            for region in annotation.iterfind("Regions/Region"):
                corners = [(float(v.attrib["X"]), float(v.attrib["Y"])) for v in region.iterfind("Vertices/Vertex")]
                yield name, np.array(corners, float).reshape(-1, 2)
    except UNREADABLE as error:
        raise unreadable(error) from error


def _without_copies(_: Path, samples: list[Sample]) -> Iterator[Sample]:
    """Keep a slide only where it has no TIFF beside it: in the test set some have none."""
    tiffs = {sample.images[0].with_suffix("") for sample in samples if sample.images[0].suffix == ".tif"}
    for sample in samples:
        image = sample.images[0]
        if image.suffix == ".tif" or image.with_suffix("") not in tiffs:
            yield sample


IMPORTER = Importer(
    title="Nuclei of four organs (MoNuSAC)",
    licence="CC BY-NC-SA 4.0; cite Verma et al. 2021, IEEE TMI",
    classes=("epithelial", "lymphocyte", "macrophage", "neutrophil"),
    label=polygons(imagescope, {"ambiguous": 0, "epithelial": 1, "lymphocyte": 2, "macrophage": 3, "neutrophil": 4}),
    patterns=tuple(
        Patterns(
            f"**/TCGA-{{centre}}-{{patient}}-{{slide}}/{{stem}}.{suffix}",
            "**/TCGA-{centre}-{patient}-{slide}/{stem}.xml",
            site="MoNuSAC",
            subject="TCGA-{centre}-{patient}",
        )
        for suffix in ("tif", "svs")
    ),
    refine=_without_copies,
)
