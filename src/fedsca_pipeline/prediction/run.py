"""From the folder of a model and a folder of images to results on disk, with progress and a report on the terminal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedsca_pipeline.compute import deterministic
from fedsca_pipeline.config import DecodeConfig, PredictConfig, RunConfig
from fedsca_pipeline.data.readers.decoding import decode_limits
from fedsca_pipeline.errors import ConfigError, DataError, counted
from fedsca_pipeline.model.site_model import load_site_model
from fedsca_pipeline.prediction.outputs import write_table
from fedsca_pipeline.prediction.predict import predict
from fedsca_pipeline.prediction.sources import Unreadable, find_sources

logger = logging.getLogger(__name__)


def predict_folder(
    model: Path,
    output: Path,
    config: PredictConfig,
    *,
    run: RunConfig,
    threads: int,
    decode: DecodeConfig,
    foundations: Path | None = None,
) -> pd.DataFrame:
    """Segment the images of ``config.source``, write their results and tables, and print where these are.

    Args:
        model: folder of the model.
        output: folder of the results.
        config: ``predict``.
        run: names the device.
        threads: of torch.
        decode: limits of the process that decodes.
        foundations: as ``foundation_root`` of ``load_site_model``.

    Returns:
        The table, a row per image and class.

    Raises:
        ConfigError: no source is named, or it is not there.
        DataError: no image is there; or some could not be segmented, after all others were.
        WeightsError: the model is damaged, or its foundation is missing.
    """
    if config.source is None:
        raise ConfigError("predict.source: not named; name a folder of images, or an image")
    source = Path(config.source).expanduser()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bars, decode_limits(decode), deterministic(run, threads) as device:
        found = find_sources(source, lambda files: bars.track(files, description="reading headers"))
        network = load_site_model(model, foundations, str(device))
        task = bars.add_task("segmenting", total=len(found.sources))
        done = predict(network, found.sources, output, config, lambda: bars.advance(task))
    unreadable = [*found.unreadable, *done.unreadable]
    write_table(output / "predictions.csv", done.table)
    if found.passed_over:
        others = counted(len(found.passed_over), "file")
        logger.info("passed over: %s of other formats, for example %s", others, found.passed_over[0])
    logger.info("%s segmented, %d of them now", counted(len(found.sources) - len(done.unreadable), "image"), done.new)
    Console().print(f"Masks and predictions.csv: {output}", markup=False, highlight=False, soft_wrap=True)
    _tell(unreadable, source, output / "unreadable.csv")
    return done.table


def _tell(unreadable: Sequence[Unreadable], source: Path, path: Path) -> None:
    """List what could not be segmented in a file, which is there only if there is something to list.

    Raises:
        DataError: there is.
    """
    path.unlink(missing_ok=True)
    if not unreadable:
        return
    write_table(path, pd.DataFrame(map(asdict, unreadable)))
    first = unreadable[0]
    raise DataError(
        f"{source}: {counted(len(unreadable), 'file')} could not be segmented, for example {first.file}: "
        f"{first.reason}; {first.cure}. All are listed in {path}; everything else is done"
    )
