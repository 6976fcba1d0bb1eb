"""The images below a folder, whatever their formats, each with the name of its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedsca_pipeline.data.importers.dicom_export import Export, images_of
from fedsca_pipeline.data.importers.layout import Watch
from fedsca_pipeline.data.importers.tables import visible_files
from fedsca_pipeline.data.readers.common import LITTER, BrokenSampleError, split_name
from fedsca_pipeline.data.readers.images import READERS
from fedsca_pipeline.data.readers.volumes import VOLUME_READERS, is_volume
from fedsca_pipeline.data.site_folder.discovery import leads_out
from fedsca_pipeline.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """One image, volume or DICOM series.

    ``name`` is its path below the given folder, with ``/`` and without suffix; no two have the same. ``files`` are in
    the order of their names.
    """

    name: str
    files: tuple[Path, ...]
    is_dicom: bool = False

    @property
    def is_flat(self) -> bool:
        """Whether it is a file of a flat image that is not DICOM."""
        return not self.is_dicom and not is_volume(self.files[0].name)


@dataclass(frozen=True)
class Unreadable:
    """A file that cannot be segmented, and why; ``file`` is relative to the given folder."""

    file: str
    reason: str
    cure: str


@dataclass(frozen=True)
class Found:
    """What is below a folder. ``passed_over`` are files of no known format, as a table beside the images is."""

    sources: list[Source]
    unreadable: list[Unreadable]
    passed_over: list[Path]


def find_sources(place: Path, watch: Watch = iter) -> Found:
    """Return the images in a file or below a folder, sorted by name. Hidden files are skipped.

    A DICOM series of single frames with positions in space is one source, and so is any other DICOM image; files of
    DICOM are known by their content. A segmentation (SEG) is none.

    Args:
        place: file or folder.
        watch: shows the progress of reading DICOM headers.

    Raises:
        ConfigError: there is no such file or folder.
        DataError: no image is there.
    """
    if not place.exists():
        raise ConfigError(f"predict.source: there is no {place}")
    folder = place if place.is_dir() else place.parent
    export = Export.of(folder, watch) if place.is_dir() else _export_of(place)
    found = [*_dicom_sources(export, folder, place.name)]
    unreadable = [_unreadable(path, folder, error) for path, error in export.unreadable.items()]
    passed_over = []
    for path in visible_files(folder) if place.is_dir() else [place]:
        if path in export.files or path in export.unreadable or path.name.lower() in LITTER:
            continue
        if split_name(path.name)[1] not in READERS.keys() | VOLUME_READERS.keys():
            passed_over.append(path)
        elif leads_out(path, folder):
            error = BrokenSampleError("a link that leads out of the folder", "copy the file itself there")
            unreadable.append(_unreadable(path, folder, error))
        else:
            found.append(Source(_stem(path, folder), (path,)))
    if not found and not unreadable:
        raise DataError(
            f"{place}: no image there; known are DICOM and {', '.join([*READERS, *VOLUME_READERS])}"
            + (f"; passed over: {passed_over[0].relative_to(folder)}" if passed_over else "")
        )
    return Found(sorted(_named_apart(found), key=lambda source: source.name), unreadable, passed_over)


def _export_of(file: Path) -> Export:
    """Return the export that holds one file, if it is DICOM, and else nothing."""
    return Export.of(file.parent, lambda files: (path for path in files if path == file))


def _dicom_sources(export: Export, folder: Path, name: str) -> Iterator[Source]:
    """Yield the images of an export; a series with a folder of its own has the folder's name."""
    images = list(images_of(export.files))
    inhabitants = Counter(parent for _, _, files in images for parent in {file.parent for file in files})
    for uid, _, files in images:
        parents = {file.parent for file in files}
        if len(files) == 1:
            own = _stem(files[0], folder)
        elif len(parents) == 1 and inhabitants[files[0].parent] == 1:
            own = files[0].parent.relative_to(folder).as_posix().replace(".", "_") if parents != {folder} else name
        else:
            own = uid
        yield Source(own, tuple(files), is_dicom=True)


def _stem(path: Path, folder: Path) -> str:
    return (path.relative_to(folder).parent / split_name(path.name)[0]).as_posix()


def _named_apart(sources: Iterable[Source]) -> list[Source]:
    """Return the sources with their suffix, as ``scan_png``, where two would have one name."""
    known = list(sources)
    often = Counter(source.name for source in known)
    named = [
        replace(source, name=f"{source.name}{source.files[0].suffix.replace('.', '_')}")
        if often[source.name] > 1
        else source
        for source in known
    ]
    _check_apart(named)
    return named


def _check_apart(sources: Sequence[Source]) -> None:
    often = Counter(source.name for source in sources)
    for source in sources:
        if often[source.name] > 1:
            raise DataError(f"{source.files[0]}: another file has the same name but for its suffix; rename one")


def _unreadable(path: Path, folder: Path, error: BrokenSampleError) -> Unreadable:
    return Unreadable(path.relative_to(folder).as_posix(), error.reason, error.cure)
