"""Scores of a site's models on its test volumes, and the chosen model's predictions, on the volumes' own grids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import Settings
from fedsca_pipeline.evaluation.scoring import SNAPSHOTS, reported

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
    from fedsca_pipeline.data.site_folder.label_rule import LabelRule
    from fedsca_pipeline.model.foundation.model import SegmentationModel
    from fedsca_pipeline.model.in_turn import ModelsInTurn


def score_test_volumes(
    in_turn: ModelsInTurn,
    settings: Settings,
    site_models: Mapping[str, Any],
    models: Path,
    raw_sites: Path,
    predictions: Path,
    manifest: pd.DataFrame,
    arrays: Path,
) -> pd.DataFrame:
    """Score one site's test volumes on the network of ``in_turn``, on their own grids.

    The chosen model's predictions are written to ``predictions/<site>/<stem>.nii.gz``; other files there are removed.
    """
    import pandas as pd

    from fedsca_pipeline.data.arrays import SiteArrays
    from fedsca_pipeline.data.site_folder.site_file import read_site_file
    from fedsca_pipeline.evaluation.volume_tables import volume_table

    site = str(manifest["site"].iloc[0])
    snapshots = site_models["sites"][site]
    folder = raw_sites / site
    rule = read_site_file(folder).label_rule
    volumes = _TestVolumes(folder, rule, manifest, SiteArrays(arrays, manifest), settings)
    same = {"best", "last"} <= snapshots.keys() and snapshots["best"]["round"] == snapshots["last"]["round"]
    tables: dict[str, pd.DataFrame] = {}
    for model, snapshot in SNAPSHOTS.items():
        if snapshot not in snapshots and model != "before":
            continue
        if model == "after" and same:
            # It is the chosen model, which also writes predictions.
            continue
        with reported(in_turn, model, models / site) as network:
            scores = volumes.score(network, predictions / site if model == "chosen" else None)
        tables[model] = volume_table(site, model, scores)
    if same:
        tables["after"] = tables["chosen"].assign(model="after")
    volumes.remove_stale(predictions / site, written="chosen" in tables)
    return pd.concat([tables[model] for model in SNAPSHOTS if model in tables], ignore_index=True)


class _TestVolumes:
    """The test volumes of one site. Each is read again for each model, so only one is in memory at a time."""

    def __init__(
        self,
        folder: Path,
        rule: LabelRule,
        manifest: Any,
        data: SiteArrays,
        settings: Settings,
    ) -> None:
        from fedsca_pipeline.data.arrays import known_classes, scored_classes

        rows = manifest[(manifest["split"] == "test") & (manifest["volume"] != "")].drop_duplicates("volume")
        self._files = rows.set_index("volume")[["image", "mask"]].to_dict("index")
        self._folder, self._rule = folder, rule
        self._preprocessing, self._evaluation = settings.preprocessing, settings.evaluation
        self._known = known_classes(data, settings.preprocessing.classes)
        self._scored = scored_classes(data, settings.preprocessing.classes)

    def score(self, network: SegmentationModel, predictions: Path | None) -> dict[str, list[dict[str, Any]]]:
        """Return the scores of each volume; write the predicted label maps to the folder ``predictions`` if given."""
        from fedsca_pipeline.data.readers.volume import write_nifti
        from fedsca_pipeline.metrics.volumes import score_volume
        from fedsca_pipeline.model.segmentation import segment_slices

        found = {}
        for stem, files in self._files.items():
            slices, truth = self._read(files)
            predicted = segment_slices(
                network,
                slices,
                self._preprocessing.image_size,
                self._evaluation.threshold,
                self._known,
                self._evaluation.batch_size,
            )
            if predictions is not None:
                write_nifti(predictions / f"{stem}.nii.gz", predicted, slices.volume.affine)
            found[stem] = score_volume(
                predicted, truth, slices.volume.spacing, self._scored, self._evaluation.surface_tolerance
            )
        return found

    def remove_stale(self, folder: Path, *, written: bool) -> None:
        """Remove predictions of earlier runs; ``written``: this run has predictions in ``folder``, which stay."""
        own = {f"{stem}.nii.gz" for stem in self._files} if written else set()
        for file in folder.glob("*.nii.gz"):
            if file.name not in own:
                file.unlink()

    def _read(self, files: dict[str, str]) -> tuple[VolumeSlices, np.ndarray]:
        from fedsca_pipeline.data.preprocessing.labels import read_volume_classes
        from fedsca_pipeline.data.preprocessing.slices import VolumeSlices
        from fedsca_pipeline.data.readers.common import BrokenSampleError
        from fedsca_pipeline.data.readers.decoding import decode_limits
        from fedsca_pipeline.data.readers.volumes import read_volume
        from fedsca_pipeline.errors import DataError

        config = self._preprocessing
        try:
            with decode_limits(config.decode):
                volume = read_volume(self._folder / files["image"])
                truth, _ = read_volume_classes(self._folder / files["mask"], volume, self._rule, config.classes)
            return VolumeSlices(volume, config.volume, config.normalise, config.image_size), truth
        except BrokenSampleError as error:
            raise DataError(
                f"{self._folder / files['image']}: the image or its mask can no longer be read ({error.unquoted}); put "
                "both back, or run 'kedro run --pipeline=preprocessing' again"
            ) from error
