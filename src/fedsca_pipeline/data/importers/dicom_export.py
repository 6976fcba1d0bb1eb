"""The DICOM files of a folder, and the images that they make up.

Names of files and folders may name patients, so no message contains any.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedsca_pipeline.data.importers.layout import Watch
from fedsca_pipeline.data.importers.tables import visible_files
from fedsca_pipeline.data.readers.common import LITTER, BrokenSampleError
from fedsca_pipeline.data.readers.dicom import Relations, read_relations
from fedsca_pipeline.data.site_folder.discovery import is_own_file
from fedsca_pipeline.data.site_folder.identifiers import is_dicom


@dataclass(frozen=True)
class Export:
    """The DICOM files of a folder: the readable ones, one of each instance, and the others with what is wrong."""

    files: Mapping[Path, Relations]
    unreadable: Mapping[Path, BrokenSampleError]

    @classmethod
    def of(cls, source: Path, watch: Watch) -> Export:
        """Read the headers of all DICOM files below ``source``; ``watch`` shows the progress."""
        files: dict[Path, Relations] = {}
        unreadable: dict[Path, BrokenSampleError] = {}
        instances = set()
        for path in watch(visible_files(source)):
            # A DICOMDIR lists what lies beside it.
            if path.name.lower() in LITTER or not is_own_file(path, source) or not is_dicom(path, source):
                continue
            try:
                found = read_relations(path)
            except BrokenSampleError as error:
                unreadable[path] = error
                continue
            # Exports have copies of one instance in several folders.
            if found.instance not in instances:
                instances.add(found.instance)
                files[path] = found
        return cls(files, unreadable)

    @property
    def segments(self) -> Counter[str]:
        """Number of segmentations that have a segment of this label."""
        return Counter(label for found in self.files.values() for label in set(found.segments.values()))


def images_of(files: Mapping[Path, Relations]) -> Iterator[tuple[str, tuple[str, ...], list[Path]]]:
    """Yield each image's identifier, the identifiers by which a segmentation may refer to it, and its files.

    An image is a series of several placed single frames, or a file. The only file of a series has two identifiers.
    """
    series: dict[str, list[Path]] = defaultdict(list)
    for path, found in files.items():
        if found.is_image:
            series[found.series].append(path)
    for uid, members in series.items():
        if len(members) > 1 and all(files[path].frames == 1 and files[path].placed for path in members):
            yield uid, (uid,), members
            continue
        for path in members:
            own = files[path].instance
            yield own, (own, uid) if len(members) == 1 else (own,), [path]
