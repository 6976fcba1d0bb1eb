"""Node of the prediction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import PredictConfig, Settings
from fedsca_pipeline.errors import ConfigError, DataError, counted, suggestion

logger = logging.getLogger(__name__)

_CARD = "site_model.json"


def predict_images(settings: Settings, predict: PredictConfig, models: Path, foundations: Path, predicted: Path) -> Any:
    """Segment the images of ``predict.source``, write the results and print where they are.

    Returns:
        The table, a row per image and class.

    Raises:
        ConfigError: model or source is not named, or not there.
        DataError: no image is there; or some could not be segmented, after all others were.
        WeightsError: the model is damaged, or its foundation is missing.
    """
    import pandas as pd
    from rich.progress import Progress

    from fedsca_pipeline.compute import deterministic
    from fedsca_pipeline.data.readers.decoding import decode_limits
    from fedsca_pipeline.federation.run import threads_of
    from fedsca_pipeline.model.site_model import load_site_model
    from fedsca_pipeline.prediction.outputs import write_table
    from fedsca_pipeline.prediction.predict import predict as predict_sources
    from fedsca_pipeline.prediction.sources import find_sources

    folder = _model_folder(predict.model, models)
    if predict.source is None:
        raise ConfigError("predict.source: not named; name a folder of images, or an image")
    output = Path(predict.output).expanduser() if predict.output else predicted / folder.name
    with (
        Progress(transient=True) as bars,
        decode_limits(settings.preprocessing.decode),
        deterministic(settings.run, threads_of(settings, 1)) as device,
    ):
        found = find_sources(
            Path(predict.source).expanduser(), lambda files: bars.track(files, description="reading headers")
        )
        own_foundations = foundations if folder.parent == models else None
        model = load_site_model(folder, own_foundations, str(device))
        task = bars.add_task("segmenting", total=len(found.sources))
        outcome = predict_sources(model, found.sources, output, predict, lambda: bars.advance(task))
    unreadable = [*found.unreadable, *outcome.unreadable]
    write_table(output / "predictions.csv", outcome.table)
    listed = output / "unreadable.csv"
    listed.unlink(missing_ok=True)
    _report(found.passed_over, len(found.sources) - len(outcome.unreadable), outcome.new, output)
    if unreadable:
        write_table(listed, pd.DataFrame(map(asdict, unreadable)))
        first = unreadable[0]
        raise DataError(
            f"{counted(len(unreadable), 'file')} of {predict.source} could not be segmented, for example {first.file}: "
            f"{first.reason}; {first.cure}. Each is listed in {listed}; all others are done"
        )
    return outcome.table


def _model_folder(model: str | None, models: Path) -> Path:
    """Return the folder of a model that is named by its site or by its path.

    Raises:
        ConfigError: there is none.
    """
    sites = sorted(card.parent.name for card in models.glob(f"*/{_CARD}"))
    if model is None:
        raise ConfigError(f"predict.model: not named; name a site ({', '.join(sites) or 'none has a model yet'})")
    for folder in (models / model, Path(model).expanduser()):
        if (folder / _CARD).is_file():
            return folder
    raise ConfigError(
        f"predict.model: {model!r} is no site with a model, and no folder of one{suggestion(model, sites)}"
    )


def _report(passed_over: Sequence[Path], done: int, new: int, output: Path) -> None:
    """Log what was done, and print where the results are."""
    from rich.console import Console

    if passed_over:
        logger.info(
            "passed over: %s of other formats, for example %s", counted(len(passed_over), "file"), passed_over[0]
        )
    logger.info("%s segmented, %d of them now", counted(done, "image"), new)
    Console().print(f"Masks, overlays and predictions.csv: {output}", markup=False, highlight=False, soft_wrap=True)
