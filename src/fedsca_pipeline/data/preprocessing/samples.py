"""An image file and its mask as rows of the arrays: one row for a flat image, one row per slice for a volume."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsca_pipeline.config import MAX_IMAGE_SIZE, PreprocessingConfig
from fedsca_pipeline.data.preprocessing.geometry import ByteCounts, Channels, fit_mask, normalise_and_fit
from fedsca_pipeline.data.preprocessing.labels import occurrences, read_classes, read_volume_classes
from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.readers.decoding import decode_ahead, decode_limits
from fedsca_pipeline.data.readers.images import decode_pixels, orientations_of, read_image
from fedsca_pipeline.data.readers.volumes import is_volume, read_volume
from fedsca_pipeline.data.site_folder.label_rule import LabelRule
from fedsca_pipeline.data.site_folder.pairing import Broken, Pair
from fedsca_pipeline.data.site_folder.site_file import SiteFile
from fedsca_pipeline.files import sha256_path

# Raw values sampled per image; over a site's images they are thousands.
_VALUES = 64


@dataclass(frozen=True)
class Sample:
    """A usable image file and its mask, without their pixels.

    ``original`` is height and width, ``fitted`` height and width in the arrays, ``intensity`` the raw extremes,
    ``values`` a few raw values from all over the image, float32. ``class_pixels`` counts raw pixels of the classes
    0..K. ``planes`` lists the classes of 1..K in each resized slice of the mask; a flat image is one slice. ``spacing``
    of a volume is mm from slice to slice, row to row and column to column. ``alerts`` are warnings that the terminal
    shows too: labels may lie elsewhere, or millimetres be wrong. ``lost`` are the classes of the raw mask that the
    resized one lacks, each with an ``image_size`` that would keep it; None if there is none.
    """

    pair: Pair
    subject: str
    label_map: dict[str, int]
    sha256: str
    mask_sha256: str
    pixels: bytes
    """Digest of the decoded image: a copy in another format has the same."""
    original: tuple[int, int]
    fitted: tuple[int, int]
    intensity: tuple[float, float]
    values: np.ndarray
    kind: str
    class_pixels: np.ndarray
    planes: tuple[tuple[int, ...], ...]
    warnings: list[str]
    alerts: list[str]
    lost: dict[int, int | None]
    spacing: tuple[float, float, float] | None = None

    @property
    def is_volume(self) -> bool:
        """Whether the file is a volume."""
        return self.spacing is not None

    @property
    def classes(self) -> tuple[int, ...]:
        """The sorted classes, of 1..K, in the resized mask."""
        return tuple(sorted({label for plane in self.planes for label in plane}))


Planes = Iterable[tuple[np.ndarray, np.ndarray]]
"""A sample in the arrays: image uint8 [3, h, w] and mask uint8 [h, w] of each of its rows."""


def read_samples(
    folder: Path, pairs: Sequence[Pair], site_file: SiteFile, config: PreprocessingConfig, broken: list[Broken]
) -> Iterator[tuple[Sample, Planes]]:
    """Yield the usable samples with their planes, one at a time; add the others to ``broken``.

    Planes are computed on demand from the image in memory, so use them before the next sample.
    """
    _begin(folder, site_file, config, pairs[:1])
    for number, pair in enumerate(pairs, start=1):
        # Its decoder works while this process prepares the pair before.
        _begin(folder, site_file, config, pairs[number : number + 1])
        outcome = _read(folder, site_file, config, pair)
        if isinstance(outcome, Broken):
            broken.append(outcome)
        else:
            yield outcome


def _begin(folder: Path, site_file: SiteFile, config: PreprocessingConfig, pairs: Sequence[Pair]) -> None:
    """Let flat images and their masks be decoded before ``_read`` asks for them."""
    rule = site_file.label_rule
    for pair in pairs:
        # Masks of colours or numbers may be decoded twice, and a volume's mask needs the image's grid.
        if not (is_volume(pair.image) or is_volume(pair.mask) or (rule.colours and rule.numbers)):
            with decode_limits(config.decode):
                decode_ahead(decode_pixels, folder / pair.image, False)
                decode_ahead(decode_pixels, folder / pair.mask, rule.threshold is None and not rule.colours)


def _read(folder: Path, site_file: SiteFile, config: PreprocessingConfig, pair: Pair) -> tuple[Sample, Planes] | Broken:
    file, files = pair.image, (folder / pair.image, folder / pair.mask)
    try:
        subject = site_file.subject(pair.stem)
        kind = _VOLUME if is_volume(pair.image) else _FLAT
        with decode_limits(config.decode):
            image = kind.read_image(files[0], config)
            file = pair.mask
            if is_volume(pair.mask) != is_volume(pair.image):
                raise BrokenSampleError(
                    f"of {pair.image} and its mask one is a volume, the other flat",
                    "export both as volumes, or both slice by slice",
                )
            mask, label_map = kind.read_mask(files, image, site_file.label_rule, config.classes)
        if not config.allow_empty_masks and not mask.any():
            raise BrokenSampleError("empty mask", "label it, or set preprocessing.allow_empty_masks: true")
        described = {
            "pair": pair,
            "subject": subject,
            "label_map": label_map,
            "sha256": sha256_path(files[0]),
            "mask_sha256": sha256_path(files[1]),
            "alerts": kind.alerts(files, image),
            "class_pixels": occurrences(mask, range(config.classes + 1)),
        }
        return kind.sample(image, mask, described, config)
    except BrokenSampleError as error:
        return Broken.of(file, BrokenSampleError(_within(folder, error.reason), error.cure))


def _within(folder: Path, reason: str) -> str:
    """Return a library's message without the folder's path, since reports are also read elsewhere."""
    return reason.replace(f"{folder}{os.sep}", "").replace(f"{repr(str(folder))[1:-1]}{os.sep}", "")


def _flat_image(path: Path, _config: PreprocessingConfig) -> np.ndarray:
    return read_image(path)


def _flat_mask(
    files: tuple[Path, Path], image: np.ndarray, rule: LabelRule, classes: int
) -> tuple[np.ndarray, dict[str, int]]:
    mask, label_map = read_classes(files[1], rule, classes)
    if image.shape[:2] != mask.shape:
        its, own = orientations_of(files)
        tags = "" if its == own else f"; its Orientation tag is {own}, that of its image {its}"
        raise BrokenSampleError(
            f"is {mask.shape[0]} x {mask.shape[1]} pixels (rows x columns), its image upright is "
            f"{image.shape[0]} x {image.shape[1]}{tags}",
            "export both at one size and orientation",
        )
    return mask, label_map


def _flat_alerts(files: tuple[Path, Path], _image: np.ndarray) -> list[str]:
    image, mask = orientations_of(files)
    if image == mask:
        return []
    return [
        f"its Orientation tag is {image}, that of its mask {mask}; each is turned by its own tag, so see in the data "
        "report that the labels lie on the image"
    ]


def _flat_sample(
    image: np.ndarray, mask: np.ndarray, described: Mapping[str, Any], config: PreprocessingConfig
) -> tuple[Sample, Planes]:
    channels = Channels.of(image)
    levels, warnings = normalise_and_fit(channels, config.normalise, config.image_size)
    small = fit_mask(mask, config.image_size)
    occurring = [np.flatnonzero(described["class_pixels"]).tolist()] if small is mask else _occurring([small])
    lost = _lost(described["class_pixels"], occurring, config.image_size, lambda side: [fit_mask(mask, side)])
    sample = Sample(
        **described,
        pixels=_digest(image, channels.distinct),
        intensity=channels.extremes,
        values=_scattered(image),
        kind=f"{image.dtype} {'grey' if image.ndim == 2 else 'RGB'}",
        original=(int(mask.shape[0]), int(mask.shape[1])),
        fitted=(int(small.shape[0]), int(small.shape[1])),
        warnings=warnings + _lost_warning(lost, config.image_size),
        lost=lost,
        planes=_shown(occurring),
    )
    return sample, [(levels, small)]


def _slices(path: Path, config: PreprocessingConfig) -> VolumeSlices:
    return VolumeSlices(read_volume(path), config.volume, config.normalise, config.image_size)


def _volume_mask(
    files: tuple[Path, Path], slices: VolumeSlices, rule: LabelRule, classes: int
) -> tuple[np.ndarray, dict[str, int]]:
    return read_volume_classes(files[1], slices.volume, rule, classes)


def _volume_alerts(_files: tuple[Path, Path], slices: VolumeSlices) -> list[str]:
    return list(slices.volume.alerts)


def _volume_sample(
    slices: VolumeSlices, mask: np.ndarray, described: Mapping[str, Any], config: PreprocessingConfig
) -> tuple[Sample, Planes]:
    voxels, small = slices.volume.voxels, slices.masks(mask)
    occurring = _occurring(small)
    modalities = f" of {voxels.shape[3]} modalities" if voxels.ndim == 4 else ""
    lost = _lost(described["class_pixels"], occurring, config.image_size, lambda side: slices.masks(mask, side))
    sample = Sample(
        **described,
        pixels=_digest(voxels, voxels),
        intensity=(float(voxels.min()), float(voxels.max())),
        values=_scattered(voxels),
        kind=f"{voxels.dtype} volume{modalities}",
        original=slices.size,
        fitted=(int(small[0].shape[0]), int(small[0].shape[1])),
        warnings=slices.warnings + _lost_warning(lost, config.image_size),
        lost=lost,
        planes=_shown(occurring),
        spacing=slices.spacing,
    )
    return sample, ((slices.image(index), small[index]) for index in range(len(slices)))


def _digest(image: np.ndarray, values: np.ndarray) -> bytes:
    """Return a digest of a decoded image: its shape, type and distinct channels."""
    digest = hashlib.sha256(f"{image.shape}{image.dtype}".encode())
    digest.update(np.ascontiguousarray(values).data)
    return digest.digest()


def _scattered(image: np.ndarray) -> np.ndarray:
    return image.flat[np.linspace(0, image.size - 1, _VALUES).astype(np.int64)].astype(np.float32)


def _occurring(small: Iterable[np.ndarray]) -> list[list[int]]:
    return [ByteCounts.of([plane]).values.tolist() for plane in small]


def _shown(occurring: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(label for label in labels if label) for labels in occurring)


def _lost(
    class_pixels: np.ndarray,
    occurring: Iterable[Sequence[int]],
    side: int,
    resized: Callable[[int], Sequence[np.ndarray]],
) -> dict[int, int | None]:
    """Return ``Sample.lost``; ``resized`` returns the mask's slices at another size."""
    lost: dict[int, int | None] = dict.fromkeys(
        sorted(set(np.flatnonzero(class_pixels).tolist()).difference(*occurring))
    )
    while side < MAX_IMAGE_SIZE and None in lost.values():
        side = min(2 * side, MAX_IMAGE_SIZE)
        kept = set().union(*_occurring(resized(side)))
        lost |= {label: side for label, size in lost.items() if size is None and label in kept}
    return lost


def _lost_warning(lost: Mapping[int, int | None], side: int) -> list[str]:
    return [f"its mask loses class {', '.join(map(str, lost))} at {side} pixels"] if lost else []


@dataclass(frozen=True)
class _Kind:
    """Functions for flat images, or for volumes: read the image, read its mask as classes, doubt, make the sample.

    ``read_mask`` and ``alerts`` receive both files, and the image that ``read_image`` returned.
    """

    read_image: Callable[[Path, PreprocessingConfig], Any]
    read_mask: Callable[[tuple[Path, Path], Any, LabelRule, int], tuple[np.ndarray, dict[str, int]]]
    alerts: Callable[[tuple[Path, Path], Any], list[str]]
    sample: Callable[[Any, np.ndarray, Mapping[str, Any], PreprocessingConfig], tuple[Sample, Planes]]


_FLAT = _Kind(_flat_image, _flat_mask, _flat_alerts, _flat_sample)
_VOLUME = _Kind(_slices, _volume_mask, _volume_alerts, _volume_sample)
