"""Published layouts to site folders. One file a layout in ``layouts``, whose name is what ``importer=`` asks for."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from fedsca_pipeline.data.importers import layouts
from fedsca_pipeline.data.importers.layout import Importer, Watch
from fedsca_pipeline.errors import ConfigError

_MERGE = "merge"


def importer_names() -> tuple[str, ...]:
    """Return the importers' names: the files of ``layouts``."""
    return tuple(module.name for module in pkgutil.iter_modules(layouts.__path__))


def find_importer(name: str | None, source: Path, options: Mapping[str, str], watch: Watch = iter) -> Importer:
    """Return the importer of that name, ready for ``source``, whose files it may have to go through, by ``watch``.

    Raises:
        ConfigError: there is none, with the nearest name and all of them; or an option is not its own, or is wrong.
    """
    names = importer_names()
    if name not in names:
        near = get_close_matches(str(name), names, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ";"
        raise ConfigError(f"importer: no importer {name!r}{hint} there are: {', '.join(names)}")
    importer: Importer = import_module(f"{layouts.__name__}.{name}").IMPORTER
    own = {option: value for option, value in options.items() if option != _MERGE}
    if unknown := sorted(set(own) - set(importer.options)):
        raise ConfigError(
            f"import_options.{unknown[0]}: importer {name!r} has {', '.join((*importer.options, _MERGE))}"
        )
    if importer.configure:
        importer = importer.configure(source, own, watch)
    return importer.merge(str(options[_MERGE])) if _MERGE in options else importer
