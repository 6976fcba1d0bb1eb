"""Node of the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsca_pipeline.config import PredictConfig, Settings
from fedsca_pipeline.errors import ConfigError, suggestion


def predict_images(settings: Settings, predict: PredictConfig, models: Path, foundations: Path, predicted: Path) -> Any:
    """Segment new images with a model, and return the table; see ``prediction.run.predict_folder``.

    Raises:
        ConfigError: model or source is not named, or not there.
    """
    folder = _model_folder(predict.model, models)

    from fedsca_pipeline.federation.run import threads_of
    from fedsca_pipeline.prediction.run import predict_folder

    return predict_folder(
        folder,
        Path(predict.output).expanduser() if predict.output else predicted / folder.name,
        predict,
        run=settings.run,
        threads=threads_of(settings, 1),
        decode=settings.preprocessing.decode,
        # A model from elsewhere brings its own foundation, or says where that is.
        foundations=foundations if folder.parent == models else None,
    )


def _model_folder(model: str | None, models: Path) -> Path:
    """Return the folder of a model that is named by its site or by its path.

    Raises:
        ConfigError: there is none.
    """
    # The general model of a run has a name with an underscore; sites come first.
    sites = sorted(
        (card.parent.name for card in models.glob("*/site_model.json")), key=lambda name: (name[0] == "_", name)
    )
    if model is None:
        raise ConfigError(f"predict.model: not named; name a site ({', '.join(sites) or 'none has a model yet'})")
    for folder in (models / model, Path(model).expanduser()):
        if (folder / "site_model.json").is_file():
            return folder
    known = suggestion(model, sites)
    raise ConfigError(f"predict.model: {model!r} is no site with a model, and no folder of one{known}")
