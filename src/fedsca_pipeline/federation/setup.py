"""Settings to what trains: model, layout, strategy and local settings, for every place where a site trains.

The in-process run, a comparison's cell and a hospital's worker all start here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedsca_pipeline.config import Settings
from fedsca_pipeline.federation.site.steps import LocalSettings
from fedsca_pipeline.federation.site.worker import LocalWorker
from fedsca_pipeline.federation.strategies import build_strategy, strategy_class, strategy_options
from fedsca_pipeline.federation.strategies.base import Strategy
from fedsca_pipeline.model.adapters.attach import build_trainable
from fedsca_pipeline.model.foundation.model import SegmentationModel
from fedsca_pipeline.model.layout import TensorLayout


@dataclass(frozen=True)
class Setup:
    """What a run trains with.

    ``settings``: the run's, or those of the one pooled site if the strategy pools. ``model``: on the CPU, adapters
    attached, trainable tensors at their start values. ``layout``: places of its tensors. ``local``: the local settings
    that all sites share.
    """

    settings: Settings
    model: SegmentationModel
    layout: TensorLayout
    strategy: Strategy
    local: LocalSettings

    def worker(self, device: torch.device) -> LocalWorker:
        """Return a worker on ``device``. It moves the model there."""
        return LocalWorker(self.model.to(device), self.strategy, self.local)


def set_up(settings: Settings, foundations: Path, *, run: str, sites: int) -> Setup:
    """Return what trains under ``settings``.

    Args:
        settings: of the run.
        foundations: folder of the foundations' weights.
        run: the run's fingerprint, part of every message.
        sites: number of sites of the run, which share the room of ``training.feature_cache``.

    Raises:
        ConfigError: the strategy's options are wrong, or it cannot be used with ``adapters.method``.
        WeightsError: the foundation's weights are missing or damaged.
    """
    name, options = settings.federation.strategy, settings.strategy_options
    strategy_class(name).check_use(strategy_options(name, options), settings.adapters.method)
    model, layout = build_trainable(settings.foundation, settings.adapters, foundations, settings.preprocessing)
    strategy = build_strategy(name, options, layout)
    if strategy.pools:
        settings, sites = settings.pooled(sites), 1
    federation, evaluation, training = settings.federation, settings.evaluation, settings.training
    local = LocalSettings(
        run=run,
        seed=settings.run.seed,
        classes=settings.preprocessing.classes,
        wire_dtype=federation.wire_dtype,
        evaluation_batch=evaluation.batch_size,
        threshold=evaluation.threshold,
        training=training,
        compression=federation.compression,
        cache_bytes=int(training.feature_cache * 2**30 / sites),
        validate_every=evaluation.every,
        validate_after_training=evaluation.after_training,
        rounds=federation.rounds,
    )
    return Setup(settings, model, layout, strategy, local)
