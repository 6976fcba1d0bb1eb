"""The project's settings and its presets."""

from __future__ import annotations

from pathlib import Path

from kedro.config import OmegaConfigLoader

from fedsca_pipeline.settings import CONFIG_LOADER_ARGS


def test_no_two_presets_share_a_data_root(project: Path) -> None:
    conf = project / "conf"
    presets = sorted(path.parent.name for path in conf.glob("*/parameters.yml") if path.parent.name != "base")

    roots = {
        preset: OmegaConfigLoader(str(conf), env=preset, **CONFIG_LOADER_ARGS)["catalog"]["raw_sites"]["path"]
        for preset in ("local", *presets)
    }

    assert roots == {"local": "data/01_raw", **{preset: f"data/{preset}/01_raw" for preset in presets}}
    assert len(presets) >= 6
