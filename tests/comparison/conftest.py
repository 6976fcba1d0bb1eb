"""Fixtures for grids of tiny cells: settings, hand-made results, and sites on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from fedsca_pipeline.comparison.plan import Cell, Setting, cells, resolve_methods
from fedsca_pipeline.config import GROUPS, ComparisonConfig
from fedsca_pipeline.data.arrays import SiteArrays
from fedsca_pipeline.data.manifest import manifest_digest

SIDE = 32
SITES = ("a", "b", "c")
# The smallest values that work.
TINY: Mapping[str, Mapping[str, Any]] = {
    "run": {"threads": 1},
    "preprocessing": {"image_size": SIDE},
    "foundation": {"name": "random"},
    "adapters": {"width": 4},
    "training": {"steps_per_round": 2, "learning_rate": 0.01},
    "federation": {"rounds": 2},
}


@pytest.fixture
def make_setting() -> Callable[..., Setting]:
    """Make a setting of sites a, b and c; ``base`` changes ``TINY``, other keywords are keys of ``comparison``."""

    def make(
        methods: Mapping[str, Any] | None = None,
        *,
        base: Mapping[str, Mapping[str, Any]] | None = None,
        strategies: Mapping[str, Any] | None = None,
        data: Mapping[str, str] | None = None,
        foundation: str = "f",
        **comparison: Any,
    ) -> Setting:
        groups = {
            name: model.model_validate({**TINY.get(name, {}), **(base or {}).get(name, {})}).model_dump(mode="json")
            for name, model in GROUPS.items()
        }
        config = ComparisonConfig.model_validate(
            {"methods": methods or {"fedsca": {}, "local": {}, "fedavg": {}}, "seeds": [0], **comparison}
        )
        return Setting(
            groups, strategies or {}, data or {site: f"data of {site}" for site in SITES}, foundation, config
        )

    return make


def _grid(setting: Setting, rates: Mapping[str, float] | None = None) -> list[Cell]:
    methods = resolve_methods(setting)
    return cells(methods, setting, {name: method.rates[0] for name, method in methods.items()} | dict(rates or {}))


def _result_of(
    cell: Cell, dice: float | Mapping[str, float] = 0.5, *, images: int = 3, code: str = "now", validation: float = 0.5
) -> dict[str, Any]:
    at = dice if isinstance(dice, Mapping) else dict.fromkeys((*cell.sites, *cell.unseen), dice)

    def scores(site: str) -> dict[str, Any]:
        values = [round(at[site] + 0.01 * number, 5) for number in range(images)]
        return {"images": [f"{site}{number}" for number in range(images)], "dice": values, "hd95": [4.0] * images}

    def record(round_: int, *, final: bool) -> dict[str, Any]:
        reported = {"dice_validation": 0.1 * round_}
        if not final:
            reported |= {"loss": 1.0 / round_, "self_weight": 0.5, "update_norm": 2.0, "spread": 0.25}
        count = len(cell.sites)
        matrices = {"similarity": np.full((count, count), 0.25).tolist(), "weights": np.eye(count).tolist()}
        return {
            "round": round_,
            "final": final,
            "bytes": 100,
            "accepted": [] if final else list(cell.sites),
            "sites": {site: dict(reported) for site in cell.sites},
            **({} if final else matrices),
        }

    return {
        "fingerprint": cell.fingerprint,
        "code": code,
        "description": dict(cell.description),
        "method": cell.method,
        "left_out": cell.left_out,
        "sites": {site: {"round": 2, "dice_validation": validation, **scores(site)} for site in cell.sites},
        "rounds": [record(1, final=False), record(2, final=False), record(3, final=True)],
        "traffic": {"bytes_up": 10.0, "bytes_down": 20.0, "bytes_to_95": 120.0},
        "unseen": {site: {"ensemble": scores(site), "2 images": scores(site)} for site in cell.unseen},
        "seconds": 3.0,
        "peak_memory": 2**20,
    }


@pytest.fixture
def grid() -> Callable[..., list[Cell]]:
    """Return the cells of a setting; each method uses its first learning rate unless ``rates`` names another."""
    return _grid


@pytest.fixture
def result_of() -> Callable[..., dict[str, Any]]:
    """Return a possible result of a cell: ``dice`` for every image, or by site; image i has 0.01 i more."""
    return _result_of


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., tuple[Path, pd.DataFrame]]:
    """Write one site of bright squares on noise: ``training`` images, 2 validation images, 2 test images.

    Returns file and manifest. The squares have the classes ``labels``, in turn.
    """

    def write(
        name: str,
        seed: int = 0,
        *,
        training: int = 6,
        splits: list[str] | None = None,
        labels: Sequence[int] = (1,),
    ) -> tuple[Path, pd.DataFrame]:
        splits = splits or ["train"] * training + ["validation"] * 2 + ["test"] * 2
        draw, count = np.random.default_rng(seed), len(splits)
        images = draw.integers(0, 100, (count, 3, SIDE, SIDE), dtype=np.uint8)
        masks = np.zeros((count, SIDE, SIDE), np.uint8)
        for index in range(count):
            top, left = draw.integers(0, SIDE // 2, 2)
            masks[index, top : top + 10, left : left + 10] = labels[index % len(labels)]
            images[index, :, masks[index] > 0] += 120
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
                "classes": [f"[{labels[index % len(labels)]}]" for index in range(count)],
            }
        )
        path = tmp_path / f"{name}.safetensors"
        sizes = np.full((count, 2), SIDE, np.int32)
        save_file({"images": images, "masks": masks, "sizes": sizes, "manifest": manifest_digest(manifest)}, path)
        return path, manifest

    return write


@pytest.fixture
def arrays(make_site: Callable[..., tuple[Path, pd.DataFrame]]) -> dict[str, SiteArrays]:
    """Sites a, b and c of ten images each."""
    return {name: SiteArrays(*make_site(name, seed)) for seed, name in enumerate(SITES)}
