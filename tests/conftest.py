"""Fixtures that more than one test folder needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# A loaded machine is not a failing law.
settings.register_profile("project", deadline=None)
settings.load_profile("project")

# cuBLAS reads it when CUDA starts, which a test may do before a run would set it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

PROJECT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Keep the collector from going through what test files import, a million objects, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the Kedro project."""
    return PROJECT


@pytest.fixture(scope="session")
def foundation_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the real mobile_sam has been fetched, verified and converted once."""
    from fedsca_pipeline.config import FoundationConfig
    from fedsca_pipeline.model.foundation import prepare_foundation

    root = tmp_path_factory.mktemp("foundations")
    prepare_foundation(FoundationConfig(), root)
    return root


@pytest.fixture(scope="session")
def nuclei_root() -> Path:
    """The nuclei sites of docs/nuclei.md."""
    root = Path(os.environ.get("FEDSCA_NUCLEI", PROJECT.parent / "shared" / "data" / "nuclei"))
    if not root.is_dir():
        pytest.skip("the nuclei sites are not here; set FEDSCA_NUCLEI to their folder (docs/nuclei.md)")
    return root


@pytest.fixture(scope="session")
def retina_root() -> Path:
    """Sites of retinal vessels: chase_db1, whose 28 images are called ``01L``, and others."""
    root = Path(os.environ.get("FEDSCA_RETINA", PROJECT.parent / "shared" / "data" / "retina"))
    if not root.is_dir():
        pytest.skip("the retinal sites are not here; set FEDSCA_RETINA to their folder")
    return root


@pytest.fixture(scope="session")
def write_volume_site() -> Callable[..., None]:
    """Writes a site of phantom volumes [size, size, slices] as ``.nii.gz``: lesions in the middle, none at the ends."""
    import nibabel
    from scipy import ndimage

    from fedsca_pipeline.data.demo.phantoms import make_phantom

    def phantom(size: int, slices: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        sick, healthy = (
            make_phantom(
                size, np.random.default_rng(seed), np.random.default_rng(seed + 1), lesions=count, radius=(0.2, 0.3)
            )
            for count in (2, 0)
        )
        depth = ndimage.distance_transform_edt(sick.lesions)[..., None]
        away = np.abs(np.arange(slices) - (slices - 1) / 2)
        lesions = depth > 1.5 * away
        tissue = np.where(lesions, sick.tissue[..., None], healthy.tissue[..., None])
        # Rows and columns of a picture run to the back and to the left; a grid of RAS+ runs the other way.
        ras = [np.swapaxes(field, 0, 1)[::-1, ::-1] for field in (tissue, lesions)]
        return np.rint(1000 * ras[0] - 500).astype(np.int16), ras[1].astype(np.uint8)

    def write(
        folder: Path,
        *,
        count: int = 5,
        size: int = 32,
        slices: int = 7,
        seed: int = 0,
        affine: np.ndarray | None = None,
    ) -> None:
        affine = np.diag([0.8, 0.8, 2.5, 1.0]) if affine is None else affine
        for number in range(count):
            image, mask = phantom(size, slices, 100 * seed + 10 * number)
            for kind, voxels in (("images", image), ("masks", mask)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                # The grid may run in any direction; what is at which place does not change.
                there = nibabel.Nifti1Image(voxels, np.diag([0.8, 0.8, 2.5, 1.0]))
                axes = nibabel.orientations.ornt_transform(
                    nibabel.io_orientation(there.affine), nibabel.io_orientation(affine)
                )
                turned = there.as_reoriented(axes)
                nibabel.save(
                    nibabel.Nifti1Image(np.asanyarray(turned.dataobj), affine), folder / kind / f"v{number}.nii.gz"
                )

    return write


class DicomFiles:
    """Writes DICOM files; ``elements`` of every method set or replace elements by keyword."""

    AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    def data_set(self, stored: np.ndarray, **elements: Any) -> Any:
        """Return a CT slice with these stored pixels, [H, W] of integers or [H, W, 3] of uint8."""
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        values: dict[str, Any] = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": generate_uid(),
            "StudyInstanceUID": generate_uid(),
            "SeriesInstanceUID": generate_uid(),
            "FrameOfReferenceUID": generate_uid(),
            "PatientID": "P1",
            "PatientName": "Somebody^One",
            "Modality": "CT",
            "InstanceNumber": 1,
            "ImageOrientationPatient": list(self.AXIAL),
            "ImagePositionPatient": [0.0, 0.0, 0.0],
            "PixelSpacing": [1.0, 1.0],
            "SliceThickness": 1.0,
            "Rows": stored.shape[0],
            "Columns": stored.shape[1],
            "SamplesPerPixel": 1 if stored.ndim == 2 else 3,
            "PhotometricInterpretation": "MONOCHROME2" if stored.ndim == 2 else "RGB",
            "BitsAllocated": stored.itemsize * 8,
            "BitsStored": stored.itemsize * 8,
            "HighBit": stored.itemsize * 8 - 1,
            "PixelRepresentation": int(stored.dtype.kind == "i"),
            **dict.fromkeys(("PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime")),
            "ReferringPhysicianName": None,
            "SeriesNumber": 1,
            **elements,
        }
        if stored.ndim == 3:
            values.setdefault("PlanarConfiguration", 0)
        for keyword, value in values.items():
            setattr(data, keyword, value)
        data.PixelData = stored.tobytes()
        data["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        return data

    def frame(self, path: Path, stored: np.ndarray, **elements: Any) -> Path:
        """Write one frame."""
        return self.save(path, self.data_set(stored, **elements))

    def save(self, path: Path, data: Any) -> Path:
        """Write a data set."""
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(path, enforce_file_format=True)
        return path

    def slices(self, stored: np.ndarray, affine: np.ndarray, **elements: Any) -> list[Any]:
        """Return a series of stored [X, Y, Z], whose affine is that of nibabel (RAS+, mm)."""
        from pydicom.uid import generate_uid

        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
        column, row = (np.linalg.norm(lps[:3, axis]) for axis in (0, 1))
        shared = {
            "StudyInstanceUID": generate_uid(),
            "SeriesInstanceUID": generate_uid(),
            "FrameOfReferenceUID": generate_uid(),
            "ImageOrientationPatient": [*(lps[:3, 0] / column), *(lps[:3, 1] / row)],
            "PixelSpacing": [row, column],
            "SliceThickness": float(np.linalg.norm(lps[:3, 2])),
            **elements,
        }
        return [
            self.data_set(
                np.ascontiguousarray(stored[:, :, index].T),
                ImagePositionPatient=list(lps[:3, 3] + index * lps[:3, 2]),
                InstanceNumber=index + 1,
                **shared,
            )
            for index in range(stored.shape[2])
        ]

    def series(self, folder: Path, slices: Sequence[Any]) -> Path:
        """Write a series in a folder, its files called by their place in the list."""
        for index, data in enumerate(slices):
            self.save(folder / f"{index:04d}.dcm", data)
        return folder

    def enhanced(self, slices: Sequence[Any]) -> Any:
        """Return the slices as one multi-frame data set, with a slope of 2 and an intercept of 1."""
        from pydicom import Dataset
        from pydicom.uid import EnhancedCTImageStorage

        data = self.data_set(slices[0].pixel_array, SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(slices))
        data.FrameOfReferenceUID = slices[0].FrameOfReferenceUID
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            delattr(data, keyword)
        data.PixelData = b"".join(source.PixelData for source in slices)

        def item(**elements: Any) -> Any:
            made = Dataset()
            for keyword, value in elements.items():
                setattr(made, keyword, value)
            return made

        first = slices[0]
        data.SharedFunctionalGroupsSequence = [
            item(
                PixelMeasuresSequence=[item(PixelSpacing=first.PixelSpacing, SliceThickness=3.0)],
                PlaneOrientationSequence=[item(ImageOrientationPatient=first.ImageOrientationPatient)],
                PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=1, RescaleType="US")],
            )
        ]
        data.PerFrameFunctionalGroupsSequence = [
            item(PlanePositionSequence=[item(ImagePositionPatient=source.ImagePositionPatient)]) for source in slices
        ]
        return data

    def segmentation(self, path: Path, sources: Sequence[Any], labels: np.ndarray, kind: str = "BINARY") -> Path:
        """Write labels [N, H, W, K], segment k + 1 being ``labels[..., k]`` of each source, as a DICOM SEG."""
        import highdicom
        from pydicom.sr.codedict import codes
        from pydicom.uid import generate_uid

        segments = [
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=f"segment {number}",
                segmented_property_category=codes.SCT.Organ,
                segmented_property_type=codes.SCT.Liver,
                algorithm_type="MANUAL",
            )
            for number in range(1, labels.shape[3] + 1)
        ]
        found = highdicom.seg.Segmentation(
            source_images=list(sources),
            pixel_array=labels,
            segmentation_type=kind,
            segment_descriptions=segments,
            series_instance_uid=generate_uid(),
            series_number=2,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="maker",
            manufacturer_model_name="model",
            software_versions="1",
            device_serial_number="1",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save_as(path)
        return path


@pytest.fixture(scope="session")
def dicom_files() -> DicomFiles:
    """Writes DICOM files."""
    return DicomFiles()
