"""Limits, suffixes, checks and the error for a broken sample, shared by all readers."""

from __future__ import annotations

import os
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fedsca_pipeline.errors import DataError

MAX_PIXELS = 2**25
"""Most pixels of an image; a larger one counts as a decompression bomb. No image takes a gibibyte of memory."""


class BrokenSampleError(DataError):
    """One file cannot be used: ``reason`` says why, ``cure`` what to do about it.

    ``quoted``, text from a parser or from the source, ends the reason in brackets. ``unquoted`` is the reason without
    it, for a source that may name patients.
    """

    def __init__(self, reason: str, cure: str, quoted: str = "") -> None:
        self.unquoted, self.quoted = reason, quoted
        self.reason = f"{reason} ({quoted})" if quoted else reason
        self.cure = cure
        super().__init__(f"{self.reason}; {cure}")


def finite_values(values: np.ndarray) -> np.ndarray:
    """Return an image's values unchanged.

    Raises:
        BrokenSampleError: some are NaN or infinite.
    """
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise BrokenSampleError("holds NaN or infinite values", "replace them in the source and export the image again")
    return values


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """Return a mask's values as integers: bool becomes uint8, floating point int64.

    Raises:
        BrokenSampleError: some are no whole numbers.
    """
    if values.dtype == bool:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or (values != np.rint(values)).any():
            raise BrokenSampleError(
                "mask values are not whole numbers",
                "save the mask as 8 or 16 bit integers; for two classes, set mask_threshold in the site's site.yml",
            )
        return values.astype(np.int64)
    return values


def refuse_lossy_mask(path: Path) -> None:
    """Check that a mask's format keeps labels.

    Raises:
        BrokenSampleError: it is a JPEG, whose compression alters them.
    """
    if path.suffix.lower() in LOSSY:
        raise lossy_mask("JPEG")


def lossy_mask(compression: str) -> BrokenSampleError:
    """Return the error for a mask of a compression that alters labels."""
    return BrokenSampleError(
        f"a {compression} mask: its compression alters labels",
        "export the mask as PNG or TIFF with deflate; for two classes, set mask_threshold in the site's site.yml",
    )


def split_name(name: str) -> tuple[str, str]:
    """Split a file name into stem and lower-case suffix; a double suffix (``.nii.gz``) stays whole.

    The stem is in Unicode's composed form (NFC): some systems store the accents of a name apart (NFD).
    """
    lower = name.lower()
    if lower.endswith(DOUBLE_SUFFIXES):
        suffix = next(double for double in DOUBLE_SUFFIXES if lower.endswith(double))
    else:
        # Called ten times per file; a Path takes six times as long.
        suffix = os.path.splitext(lower)[1]  # noqa: PTH122
    return unicodedata.normalize("NFC", name[: len(name) - len(suffix)]), suffix


def no_reader(suffix: str, known: Iterable[str]) -> BrokenSampleError:
    """Return the error for a file without a reader; ``known`` are the suffixes to name."""
    return BrokenSampleError(
        f"no reader for {suffix or 'a file without suffix'}", f"convert it to one of {', '.join(known)}"
    )


def litter() -> BrokenSampleError:
    """Return the error for a file whose name is in ``LITTER``."""
    return BrokenSampleError("a table of contents, or what a file browser leaves, not an image", "delete it")


def check_not_empty(path: Path) -> None:
    """Check that a file is not empty, nor the pointer that Git LFS or git-annex leaves in the place of a file.

    Raises:
        BrokenSampleError: it is.
        OSError: it cannot be reached.
    """
    size = path.stat().st_size
    if size == 0:
        raise BrokenSampleError("the file is empty", COPY_AGAIN)
    if size > _LARGEST_POINTER:
        return
    with path.open("rb") as stream:
        start = stream.read(_LARGEST_POINTER)
    for beginning, (tool, command) in _POINTERS.items():
        if start.startswith(beginning):
            raise BrokenSampleError(f"this is a pointer of {tool}, not the file itself", f"run {command}")


def unreadable(error: Exception) -> BrokenSampleError:
    """Return a parser's error as a broken sample."""
    if isinstance(error, MemoryError):
        return BrokenSampleError(
            "needs too much memory to decode", "cut it into parts, or raise preprocessing.decode.memory"
        )
    detail = " ".join(str(error).split()) or type(error).__name__
    return BrokenSampleError("cannot be read", COPY_AGAIN, quoted=detail[:200])


COPY_AGAIN = "copy or export the file again"


# Bytes; specifications of both tools allow fewer.
_LARGEST_POINTER = 2**15
# How a pointer begins: its tool, and the command that fetches the file.
_POINTERS: Mapping[bytes, tuple[str, str]] = MappingProxyType(
    {
        b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
        b"/annex/objects/": ("git-annex", "git annex get"),
    }
)


DICOM = ".dcm"


LITTER = frozenset({"dicomdir", "thumbs.db", "desktop.ini"})
"""Names, in small letters, of a table of contents and of what file browsers leave: no data."""


DOUBLE_SUFFIXES = (".nii.gz",)


LOSSY = (".jpg", ".jpeg")


# Errors of Pillow, tifffile and numpy on damaged input; any byte of a file can cause them.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
