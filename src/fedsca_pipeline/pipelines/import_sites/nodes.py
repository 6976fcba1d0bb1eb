"""Node of the import."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.errors import ConfigError

logger = logging.getLogger(__name__)


def import_sites(
    raw_sites: Path,
    importer: str | None,
    source: str | None,
    import_options: dict[str, str],
    preprocessing: PreprocessingConfig,
) -> dict[str, Any]:
    """Write the source's images as site folders; what is broken follows ``preprocessing.on_bad_sample``.

    Says what each site has, and which classes to train.

    Raises:
        ConfigError: importer or source is not named, or there is no such importer.
        DataError: see ``fedsca_pipeline.sites.importers.write``.
    """
    from rich.progress import Progress

    from fedsca_pipeline.sites.importers import find_importer, importer_names
    from fedsca_pipeline.sites.importers.write import import_sites

    if importer is None or source is None:
        raise ConfigError(
            f"{'importer' if importer is None else 'source'}: not named; "
            f'--params="importer=<name>,source=<folder>" with one of {", ".join(importer_names())}'
        )
    folder = Path(source).expanduser()
    layout = find_importer(importer, folder, import_options)
    with Progress(transient=True) as progress:
        task = progress.add_task("importing")
        summary = import_sites(
            raw_sites,
            layout,
            folder,
            quarantine=preprocessing.on_bad_sample == "quarantine",
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    for site, found in summary.items():
        logger.info(
            "%s: %d images of %d subjects, %d broken", site, found["images"], found["subjects"], len(found["broken"])
        )
    logger.info("Terms: %s", layout.licence)
    logger.info(
        "Classes: %s; train them with preprocessing.classes=%d",
        ", ".join(f"{number} {name}" for number, name in enumerate(layout.classes, start=1)),
        len(layout.classes),
    )
    return summary
