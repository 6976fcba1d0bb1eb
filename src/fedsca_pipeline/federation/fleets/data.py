"""The sites' cached arrays, opened when a site needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedsca_pipeline.data.arrays import PooledArrays, SiteArrays

if TYPE_CHECKING:
    import pandas as pd


class SiteData(Mapping[str, SiteArrays]):
    """The sites' cached arrays; each look-up opens the file, so that only sites at work are mapped into memory.

    Args:
        sources: site to file and manifest.

    Raises:
        DataError: in the constructor or a look-up: a file is missing, damaged, or not the one its manifest describes.
    """

    def __init__(self, sources: Mapping[str, tuple[Path, pd.DataFrame]]) -> None:
        self._sources = sources
        for site in sources:
            self[site]

    @classmethod
    def of(cls, manifests: Sequence[pd.DataFrame], arrays: Sequence[Path]) -> SiteData:
        """Return the data of the sites that the manifests name, each with its file of arrays."""
        pairs = zip(manifests, arrays, strict=True)
        return cls({str(manifest["site"].iloc[0]): (path, manifest) for manifest, path in pairs})

    def __getitem__(self, site: str) -> SiteArrays:
        return SiteArrays(*self._sources[site])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


POOLED = "_pooled"
"""The only site of a strategy with ``pools``; a folder of this name is never a site."""


class PooledData(Mapping[str, PooledArrays]):
    """All sites' arrays as those of the one site ``POOLED``."""

    def __init__(self, sites: Mapping[str, SiteArrays]) -> None:
        self._sites = sites

    def __getitem__(self, site: str) -> PooledArrays:
        if site != POOLED:
            raise KeyError(site)
        arrays = [self._sites[name] for name in sorted(self._sites)]
        return PooledArrays(arrays, [len(part) for part in arrays])

    def __iter__(self) -> Iterator[str]:
        return iter((POOLED,))

    def __len__(self) -> int:
        return 1
