"""A model over many images: batches, files of results, and a table; what is done already is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedsca_pipeline.config import PredictConfig
from fedsca_pipeline.data.importers.pictures import read_dicom
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.decoding import decode_ahead
from fedsca_pipeline.data.readers.images import decode_pixels, read_image
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.data.readers.volumes import read_volume
from fedsca_pipeline.model.site_model import SiteModel
from fedsca_pipeline.prediction.segmenter import COLUMNS, Picture, Row, Segmenter
from fedsca_pipeline.prediction.sources import Source, Unreadable


@dataclass(frozen=True)
class Predicted:
    """The outcome. ``table`` has a row per image and class, by name; ``new`` of the images were segmented now."""

    table: pd.DataFrame
    unreadable: list[Unreadable]
    new: int


def predict(
    model: SiteModel,
    sources: Sequence[Source],
    output: Path,
    config: PredictConfig,
    advance: Callable[[], None] = lambda: None,
) -> Predicted:
    """Segment the sources, write the results of each below ``output``, and return the table.

    A source is left as it is if its record, which is written after its results, tells of the same files, model and
    options: a stopped command goes on where it stopped. One batch of images, or one volume, is in memory.

    Args:
        model: on any device.
        sources: those of ``sources.find_sources``.
        output: folder of the results.
        config: batch size, and which results to write.
        advance: called after each source.

    Raises:
        WeightsError: the model computes values that are not finite.
        OSError: the disk is full; it names the file.
    """
    segmenter = Segmenter(model, output, config)
    rows: dict[str, list[Row]] = {}
    unreadable: list[Unreadable] = []
    batch: list[Picture] = []
    for source in sources:
        if (done := segmenter.recorded(source)) is not None:
            rows[source.name] = done
            advance()
    left = [source for source in sources if source.name not in rows]
    _begin(left[:1])
    for number, source in enumerate(left, start=1):
        # The next image is decoded while this process works on this one.
        _begin(left[number : number + 1])
        try:
            image = _read(source)
            if isinstance(image, Volume):
                rows[source.name] = segmenter.volume(source, image)
                advance()
            else:
                batch.append(Picture(source, image))
        except BrokenSampleError as error:
            unreadable.append(Unreadable(source.name, error.reason, error.cure))
            advance()
        if len(batch) == config.batch_size or (batch and number == len(left)):
            for picture, found in zip(batch, segmenter.images(batch), strict=True):
                if isinstance(found, BrokenSampleError):
                    unreadable.append(Unreadable(picture.source.name, found.reason, found.cure))
                else:
                    rows[picture.source.name] = found
                advance()
            batch = []
    table = pd.DataFrame([row for source in sources for row in rows.get(source.name, ())], columns=list(COLUMNS))
    return Predicted(table, unreadable, len(left) - len(unreadable))


def _begin(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.is_flat:
            decode_ahead(decode_pixels, source.files[0], False)


def _read(source: Source) -> np.ndarray | Volume:
    if source.is_dicom:
        return read_dicom(source.files)
    return read_image(source.files[0]) if source.is_flat else read_volume(source.files[0])
