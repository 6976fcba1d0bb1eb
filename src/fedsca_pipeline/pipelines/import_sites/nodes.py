"""Nodes of the import."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsca_pipeline.config import PreprocessingConfig
from fedsca_pipeline.errors import ConfigError, counted

if TYPE_CHECKING:
    from fedsca_pipeline.data.importers.layout import Importer

logger = logging.getLogger(__name__)


def build_sites(
    raw_sites: Path,
    private_sites: Path,
    importer: str | None,
    source: str | None,
    import_options: dict[str, str],
    hide_names: bool,
    preprocessing: PreprocessingConfig,
) -> dict[str, Any]:
    """Write the source's images as site folders, log what is in them, and print the parameters to train them.

    Broken files follow ``preprocessing.on_bad_sample``.

    Raises:
        ConfigError: importer or source is not named, or the importer is unknown.
        DataError: see ``fedsca_pipeline.data.importers.write``.
    """
    from rich.progress import Progress

    from fedsca_pipeline.data.importers import find_importer, importer_names
    from fedsca_pipeline.data.importers.write import build_sites
    from fedsca_pipeline.data.readers.decoding import decode_limits
    from fedsca_pipeline.data.site_folder.discovery import demonstration_sites

    if importer is None or source is None:
        raise ConfigError(
            f"{'importer' if importer is None else 'source'}: not named; "
            f'--params="importer=<name>,source=<folder>" with one of {", ".join(importer_names())}'
        )
    folder = Path(source).expanduser()
    with Progress(transient=True) as progress, decode_limits(preprocessing.decode):
        layout = find_importer(
            importer,
            folder,
            import_options,
            lambda files: progress.track(files, description="reading headers"),
            hide_names=hide_names,
        )
        task = progress.add_task("importing")
        summary = build_sites(
            raw_sites,
            layout,
            folder,
            private=private_sites,
            quarantine=preprocessing.on_bad_sample == "quarantine",
            progress=lambda done, of: progress.update(task, completed=done, total=of),
        )
    _report(layout, summary, demonstration_sites(raw_sites))
    return summary


def place_sites(raw_sites: Path, _import_summary: dict[str, Any]) -> None:
    """Move the written sites into place once their summary is saved: a killed import leaves no site without it."""
    from fedsca_pipeline.data.importers.write import place_built_sites

    place_built_sites(raw_sites)


def _report(layout: Importer, summary: dict[str, Any], demonstration: list[str]) -> None:
    """Log the imported and the broken files, and print the parameters to train them."""
    from rich.console import Console

    from fedsca_pipeline.data.site_folder.pairing import Broken, by_fault

    for site, found in summary.items():
        images, subjects = counted(found["images"], "image"), counted(found["subjects"], "subject")
        logger.info("%s: %s of %s, %d broken", site, images, subjects, len(found["broken"]))
        for fault in by_fault([Broken(**entry) for entry in found["broken"]]):
            logger.warning("%s: %s: %s (left out; %s)", site, fault.file, fault.reason, fault.cure)
        for alert in found["alerts"]:
            logger.warning("%s: %s", site, alert)
    if any(found["broken"] for found in summary.values()):
        logger.warning("each file is listed in 02_intermediate/import.json")
    if demonstration:
        logger.warning(
            "the demonstration sites %s are there too and would take part in training; delete them",
            ", ".join(demonstration),
        )
    logger.info("Terms: %s", layout.licence)
    logger.info(
        "Classes: %s; train them with preprocessing.classes=%d",
        ", ".join(f"{number} {name}" for number, name in enumerate(layout.classes, start=1)),
        len(layout.classes),
    )
    # Printed, since a log line is wrapped and cannot be pasted.
    Console().print(
        f"For later commands without --env, in conf/local/parameters.yml:\n\n{_settings(layout)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _settings(layout: Importer) -> str:
    """Return the parameters for the layout's classes and modalities, as YAML."""
    import yaml

    wanted: dict[str, Any] = {"classes": len(layout.classes), "class_names": list(layout.classes)}
    if layout.modalities:
        wanted["volume"] = {"modalities": list(range(len(layout.modalities)))[:_CHANNELS]}
    named = ", ".join(f"{number} {name}" for number, name in enumerate(layout.modalities))
    remark = f"# modalities, one to {_CHANNELS} of: {named}\n" if named else ""
    written = yaml.safe_dump({"preprocessing": wanted}, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return remark + written


# Channels of an image that the model takes.
_CHANNELS = 3
