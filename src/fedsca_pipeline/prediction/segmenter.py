"""One model on one batch of images, or one volume: label maps, their files, and rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from fedsca_pipeline.config import PredictConfig
from fedsca_pipeline.data.preprocessing.geometry import normalise
from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.dicom import read_pixel_spacing
from fedsca_pipeline.data.readers.volume import Volume, write_nifti
from fedsca_pipeline.files import fingerprint, read_json, sealed, sha256_file, unsealed, write_json
from fedsca_pipeline.model.heads import class_probabilities
from fedsca_pipeline.model.segmentation import full_logits, labels_of, slice_logits
from fedsca_pipeline.model.site_model import SiteModel
from fedsca_pipeline.prediction.dicom_seg import write_segmentation
from fedsca_pipeline.prediction.outputs import (
    write_label_image,
    write_overlay,
    write_probability_image,
    write_probability_volume,
)
from fedsca_pipeline.prediction.sources import Source

COLUMNS = ("image", "class", "name", "pixels", "area_mm2", "volume_ml", "confidence", "components")
"""Columns of the table. Area is that of a flat DICOM image with PixelSpacing, volume that of a volume, else empty.

``confidence`` is the mean probability of a class over the pixels that have it, empty without any; ``components`` are
its connected parts, over edges or faces.
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A flat image [H, W] or [H, W, 3] of raw values, and where it is from."""

    source: Source
    image: np.ndarray


class Segmenter:
    """Segments with one model, and writes results below one folder.

    Args:
        model: on any device.
        output: folder of the results.
        config: which results to write, and the batch size.
    """

    def __init__(self, model: SiteModel, output: Path, config: PredictConfig) -> None:
        self._model, self._output, self._config = model, output, config
        card = model.card
        self._names = card.class_names or tuple(f"class {number}" for number in range(1, card.classes + 1))
        options = {"overlays": config.overlays, "probabilities": config.probabilities}
        self._version = fingerprint({"card": card.model_dump(mode="json"), "options": options})

    def recorded(self, source: Source) -> list[Row] | None:
        """Return the rows of a source that is done: same files, model and options, and every result is there."""
        path = self._record(source)
        if not path.is_file():
            return None
        try:
            record = unsealed(read_json(path))
        except ValueError:
            # A damaged record costs one more segmentation.
            return None
        same = record["version"] == self._version and record["files"] == _digests(source)
        rows: list[Row] = record["rows"]
        return rows if same and all((self._output / result).is_file() for result in record["results"]) else None

    def images(self, pictures: Sequence[Picture]) -> Iterator[list[Row] | BrokenSampleError]:
        """Yield the rows of each image of a batch after its results were written, or why not all could be."""
        card, network = self._model.card, self._model.network
        fitted = [self._model.fit(picture.image) for picture in pictures]
        sizes = [picture.image.shape[:2] for picture in pictures]
        for picture, logits in zip(pictures, full_logits(network, fitted, sizes, card.image_size), strict=True):
            try:
                yield self._image(picture, logits)
            except BrokenSampleError as error:
                yield error

    def _image(self, picture: Picture, logits: Tensor) -> list[Row]:
        card, source, head = self._model.card, picture.source, self._model.network.head
        labels = labels_of(logits, head, card.threshold, card.known_classes)
        chances = class_probabilities(logits, head, card.known_classes)[0].float().cpu().numpy()
        results = [self._place("masks", source, ".png")]
        write_label_image(results[0], labels)
        if self._config.overlays:
            results.append(self._place("overlays", source, ".png"))
            write_overlay(results[-1], normalise(picture.image, card.normalise)[0], labels)
        if self._config.probabilities:
            results.append(self._place("probabilities", source, ".tif"))
            write_probability_image(results[-1], chances)
        spacing = read_pixel_spacing(source.files[0]) if source.is_dicom else None
        if source.is_dicom:
            results.append(self._segmentation(source, labels, None))
        rows = self._rows(
            source, labels, [_sum_where(chance, labels == k) for k, chance in enumerate(chances, start=1)]
        )
        for row in rows:
            row["area_mm2"] = None if spacing is None else row["pixels"] * spacing[0] * spacing[1]
        return self._recorded(source, results, rows)

    def volume(self, source: Source, volume: Volume) -> list[Row]:
        """Return the rows of a volume, after its results were written.

        Raises:
            BrokenSampleError: the model was trained on other modalities.
        """
        card, network = self._model.card, self._model.network
        slices = VolumeSlices(volume, card.volume, card.normalise, card.image_size)
        planes, kept, sums = [], [], np.zeros(card.classes)
        for logits in slice_logits(network, slices, card.image_size, self._config.batch_size):
            planes.append(labels_of(logits, network.head, card.threshold, card.known_classes))
            chances = class_probabilities(logits, network.head, card.known_classes)[0].float().cpu().numpy()
            sums += [_sum_where(chance, planes[-1] == k) for k, chance in enumerate(chances, start=1)]
            if self._config.probabilities:
                kept.append(np.moveaxis(chances, 0, -1).astype(np.float16))
        labels = slices.restack(planes)
        results = [self._place("masks", source, ".nii.gz")]
        write_nifti(results[0], labels, volume.affine)
        if self._config.overlays:
            results.append(self._place("overlays", source, ".png"))
            fullest = int(np.argmax([np.count_nonzero(plane) for plane in planes]))
            write_overlay(results[-1], np.moveaxis(slices.image(fullest), 0, -1), slices.masks(labels)[fullest])
        if self._config.probabilities:
            results.append(self._place("probabilities", source, ".nii.gz"))
            write_probability_volume(results[-1], slices.restack(kept), volume)
        if source.is_dicom:
            results.append(self._segmentation(source, labels, volume))
        rows = self._rows(source, labels, sums.tolist())
        for row in rows:
            row["volume_ml"] = row["pixels"] * abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
        return self._recorded(source, results, rows)

    def _rows(self, source: Source, labels: np.ndarray, sums: Sequence[float]) -> list[Row]:
        rows = []
        for number, (name, chances) in enumerate(zip(self._names, sums, strict=True), start=1):
            mask = labels == number
            pixels = int(np.count_nonzero(mask))
            row = dict.fromkeys(COLUMNS) | {"image": source.name, "class": number, "name": name, "pixels": pixels}
            row["confidence"] = round(chances / pixels, 4) if pixels else None
            row["components"] = int(ndimage.label(mask)[1])
            rows.append(row)
        return rows

    def _segmentation(self, source: Source, labels: np.ndarray, volume: Volume | None) -> Path:
        path = self._place("segmentations", source, ".dcm")
        try:
            write_segmentation(path, source.files, labels, self._names, model=self._version[:16], volume=volume)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # Its text could hold a value of the header.
            raise BrokenSampleError(
                f"its mask was written, but its header does not allow a DICOM SEG ({type(error).__name__})",
                "export it again with study, patient and positions, or use the mask",
            ) from error
        return path

    def _place(self, kind: str, source: Source, suffix: str) -> Path:
        return self._output / kind / f"{source.name}{suffix}"

    def _record(self, source: Source) -> Path:
        return self._output / ".records" / f"{source.name}.json"

    def _recorded(self, source: Source, results: Sequence[Path], rows: list[Row]) -> list[Row]:
        content = {
            "version": self._version,
            "files": _digests(source),
            "results": [path.relative_to(self._output).as_posix() for path in results],
            "rows": rows,
        }
        write_json(self._record(source), sealed(content))
        return rows


def _sum_where(values: np.ndarray, mask: np.ndarray) -> float:
    return float(values[mask].sum(dtype=np.float64))


def _digests(source: Source) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in source.files}
