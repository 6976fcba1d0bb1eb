"""A site's manifest: its columns, its digest, and the classes and names that it lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from fedsca_pipeline.data.readers.common import split_name

if TYPE_CHECKING:
    import pandas as pd

MANIFEST_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "site": "str",
        "subject": "str",
        "image": "str",
        "mask": "str",
        "split": "str",
        "label_map": "str",
        "classes": "str",
        "sha256": "str",
        "mask_sha256": "str",
        "height": "int64",
        "width": "int64",
        "original_height": "int64",
        "original_width": "int64",
        "row": "int64",
        "volume": "str",
        "slice": "int64",
        "split_settings": "str",
    }
)
"""The manifest's columns and types. A stored manifest read without them has subject 7 instead of ``007``."""


_LEARNED_FROM = ("train", "validation")


def classes_in(column: Iterable[str]) -> tuple[int, ...]:
    """Return the sorted classes in cells of a manifest's column ``classes``; empty without cells."""
    return tuple(sorted({label for cell in column for label in json.loads(cell)}))


def known_in(manifest: pd.DataFrame, classes: int) -> tuple[int, ...]:
    """Return ``known_classes`` of the site that a manifest describes."""
    learned = manifest["split"].isin(_LEARNED_FROM)
    return classes_in(manifest.loc[learned, "classes"]) or tuple(range(1, classes + 1))


def sample_names(manifest: pd.DataFrame) -> list[str]:
    """Return the name of each row in tables: the image's stem, or ``<stem>#<index>`` of a slice (three digits)."""
    stems = [split_name(PurePosixPath(image).name)[0] for image in manifest["image"]]
    return [stem if index < 0 else f"{stem}#{index:03d}" for stem, index in zip(stems, _slices(manifest), strict=True)]


def _slices(manifest: pd.DataFrame) -> list[int]:
    # Manifests written before volumes were supported lack this column.
    return manifest["slice"].tolist() if "slice" in manifest else [-1] * len(manifest)


def manifest_digest(manifest: pd.DataFrame) -> np.ndarray:
    """Return the digest that ties arrays to their manifest, uint8 [32]: SHA-256 over each row's image and split."""
    columns = (manifest[name].tolist() for name in ("row", "image", "split"))
    rows = [
        [str(row), image, split] if index < 0 else [str(row), image, split, str(index)]
        for row, image, split, index in zip(*columns, _slices(manifest), strict=True)
    ]
    return np.frombuffer(hashlib.sha256(json.dumps(rows).encode()).digest(), np.uint8)
