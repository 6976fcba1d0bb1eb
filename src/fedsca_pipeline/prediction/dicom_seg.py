"""Label maps of DICOM images as DICOM segmentations (SEG), by highdicom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsca_pipeline import __version__
from fedsca_pipeline.data.readers.volume import Volume
from fedsca_pipeline.files import atomic_path

if TYPE_CHECKING:
    import highdicom

_MAKER = "fedsca_pipeline"


def write_segmentation(
    path: Path,
    files: Sequence[Path],
    labels: np.ndarray,
    names: Sequence[str],
    *,
    model: str,
    volume: Volume | None = None,
) -> None:
    """Write a binary SEG that refers to the files it was made of, atomically. It names the patient, as they do.

    Args:
        path: of the SEG.
        files: of the image; their order does not matter.
        labels: uint8 [H, W], or [X, Y, Z] on the grid of ``volume``; 0 = background, 1..K.
        names: of the K classes, class 1 first; each is a segment, also if no pixel shows it.
        model: identifies the model; the same model and files give the same identifiers.
        volume: the image, if it is one; its frame of reference places the segments.
    """
    import highdicom
    from pydicom import dcmread
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    images = [dcmread(file, stop_before_pixels=True) for file in files]
    sources = sorted(str(image.SOPInstanceUID) for image in images)
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=_MAKER, family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            # Neither organ nor lesion is known: what 3D Slicer writes for a segment without terminology.
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(names, start=1)
    ]
    written = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=labels if volume is None else _on_grid(labels, volume),
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=generate_uid(entropy_srcs=[model, "series", *sources]),
        series_number=1,
        sop_instance_uid=generate_uid(entropy_srcs=[model, "instance", *sources]),
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name=_MAKER,
        software_versions=__version__,
        device_serial_number=model,
        omit_empty_frames=bool(labels.any()),
    )
    with atomic_path(path) as temporary:
        written.save_as(temporary)


def _on_grid(labels: np.ndarray, volume: Volume) -> highdicom.Volume:
    """Return the labels as highdicom's volume: axes from slices to columns, DICOM's directions left, back and up."""
    import highdicom

    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine[:, [2, 1, 0, 3]]
    return highdicom.Volume(
        np.ascontiguousarray(labels.transpose(2, 1, 0)),
        affine,
        coordinate_system="PATIENT",
        frame_of_reference_uid=volume.frame_of_reference,
    )
