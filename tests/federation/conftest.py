"""A tiny federation: random foundation, tiny sites on disk, one worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedsca_pipeline.adapters.attach import attach_adapters, tensor_layout
from fedsca_pipeline.config import AdaptersConfig, FoundationConfig, TrainingConfig
from fedsca_pipeline.federation.local import LocalSettings, LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy
from fedsca_pipeline.foundation import load_foundation
from fedsca_pipeline.sites.arrays import SiteArrays, manifest_digest, write_arrays

SIDE = 32


@pytest.fixture
def write_site(tmp_path: Path) -> Callable[..., tuple[Path, pd.DataFrame]]:
    """Write one site of bright squares on noise, with 2 validation images and 1 for test; return file and manifest."""

    def write(name: str, seed: int = 0, training: int = 5) -> tuple[Path, pd.DataFrame]:
        draw = np.random.default_rng(seed)
        count = training + 3
        images = draw.integers(0, 100, (count, 3, SIDE, SIDE), dtype=np.uint8)
        masks = np.zeros((count, SIDE, SIDE), np.uint8)
        for index in range(count):
            top, left = draw.integers(0, SIDE // 2, 2)
            masks[index, top : top + 10, left : left + 10] = 1
            images[index, :, masks[index] == 1] += 120
        sizes = np.full((count, 2), SIDE, np.int32)
        path = tmp_path / f"{name}.safetensors"
        splits = ["train"] * training + ["validation"] * 2 + ["test"]
        stems = [f"{index:03d}" for index in range(count)]
        manifest = pd.DataFrame(
            {
                "site": name,
                "subject": stems,
                "image": [f"images/{stem}.png" for stem in stems],
                "split": splits,
                "height": SIDE,
                "width": SIDE,
                "row": range(count),
            }
        )
        arrays = {"images": images, "masks": masks, "sizes": sizes, "manifest": manifest_digest(manifest)}
        write_arrays(path, arrays)
        return path, manifest

    return write


@pytest.fixture
def make_site(write_site: Callable[..., tuple[Path, pd.DataFrame]]) -> Callable[..., SiteArrays]:
    """Write one site (see ``write_site``) and open it."""
    return lambda name, seed=0: SiteArrays(*write_site(name, seed))


@pytest.fixture
def make_worker() -> Callable[..., LocalWorker]:
    """Build a worker on a fresh random foundation; keyword arguments go to the training parameters."""

    def make(
        strategy: str = "fedsca",
        wire_dtype: str = "fp32",
        adapters: AdaptersConfig | None = None,
        cache_bytes: int = 0,
        **training: Any,
    ) -> LocalWorker:
        foundation = FoundationConfig(name="random")
        model = load_foundation(foundation, Path("unused"), image_size=SIDE, classes=1)
        attach_adapters(model, adapters or AdaptersConfig(width=4))
        settings = LocalSettings(
            run="run",
            seed=0,
            classes=1,
            wire_dtype=wire_dtype,
            evaluation_batch=4,
            threshold=0.5,
            training=TrainingConfig(**training),
            cache_bytes=cache_bytes,
        )
        return LocalWorker(model, tensor_layout(model), build_strategy(strategy, {}), settings)

    return make
