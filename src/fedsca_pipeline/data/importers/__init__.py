"""Importers: data sets as published, or exported by a hospital, to site folders. One file a layout in ``layouts``.

The file's name is the importer's name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from fedsca_pipeline.data.importers import layouts
from fedsca_pipeline.data.importers.layout import Importer, Watch
from fedsca_pipeline.errors import ConfigError, suggestion

_MERGE = "merge"


def importer_names() -> tuple[str, ...]:
    """Return the names of all importers: the files of ``layouts``."""
    return tuple(module.name for module in pkgutil.iter_modules(layouts.__path__))


def find_importer(
    name: str | None, source: Path, options: Mapping[str, str], watch: Watch = iter, *, hide_names: bool = False
) -> Importer:
    """Return the named importer, configured for ``source``.

    Args:
        name: of a file in ``layouts``.
        source: the folder to import.
        options: of the importer, and ``merge``, which makes one class of that name of all.
        watch: receives each file of the source that is opened to configure the importer.
        hide_names: write salted-hash names even if the importer would keep the source's names.

    Raises:
        ConfigError: the importer, or an option of it, is unknown; or an option's value is wrong.
    """
    if name not in importer_names():
        raise ConfigError(f"importer: unknown {name!r}{suggestion(str(name), importer_names())}")
    importer: Importer = import_module(f"{layouts.__name__}.{name}").IMPORTER
    own = {option: value for option, value in options.items() if option != _MERGE}
    if unknown := sorted(set(own) - set(importer.options)):
        raise ConfigError(
            f"import_options.{unknown[0]}: unknown to importer {name!r}"
            f"{suggestion(unknown[0], (*importer.options, _MERGE))}"
        )
    if importer.configure:
        importer = importer.configure(source, own, watch)
    if _MERGE in options:
        importer = importer.merge(str(options[_MERGE]))
    return replace(importer, hides_names=True) if hide_names else importer
