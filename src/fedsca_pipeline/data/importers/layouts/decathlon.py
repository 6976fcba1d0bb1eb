"""A task of the Medical Segmentation Decathlon, or another data set with its ``dataset.json``.

``training`` lists images and masks, ``labels`` and ``modality`` name classes and modalities. All images
are one site, unless ``import_options.site`` finds the site in the stem. ``import_options.subject`` finds the subject.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.masks import stored_values
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import find_file, listed_file
from fedsca_pipeline.data.readers.common import BrokenSampleError, split_name
from fedsca_pipeline.errors import ConfigError, DataError, faults_by_key


class _Pair(BaseModel):
    image: str
    label: str


class _Task(BaseModel):
    """The keys of ``dataset.json`` that are read."""

    name: str = "decathlon"
    licence: str = "not stated"
    labels: dict[Annotated[int, Field(ge=0)], str] = Field(min_length=2)
    training: tuple[_Pair, ...] = Field(min_length=1)
    modality: dict[Annotated[int, Field(ge=0)], str] = Field(default_factory=dict)


def configure(source: Path, options: Mapping[str, str], __: Watch) -> Importer:
    """Return the importer of the one task in the source.

    Raises:
        ConfigError: an option is no regular expression with one group.
        DataError: no ``dataset.json``, or several, or one that is not the Decathlon's.
    """
    path = find_file(source, "dataset.json")
    try:
        task = _Task.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        problems = "; ".join(faults_by_key(error)[:3])
        raise DataError(f"{path}: not a dataset.json of the Decathlon ({problems})") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({' '.join(str(error).split())})") from error
    values = sorted(value for value in task.labels if value)
    return Importer(
        title=task.name,
        licence=task.licence,
        classes=tuple(task.labels[value] for value in values),
        label=stored_values({0: 0} | {value: number for number, value in enumerate(values, start=1)}),
        modalities=tuple(task.modality[number] for number in sorted(task.modality)) if len(task.modality) > 1 else (),
        patterns=_PATTERNS,
        refine=partial(
            _listed, path=path, task=task, site=_finder("site", options, task.name), subject=_finder("subject", options)
        ),
    )


def _listed(
    _: Path, __: list[Sample], *, path: Path, task: _Task, site: Callable[[str], str], subject: Callable[[str], str]
) -> Iterator[Sample]:
    for pair in task.training:
        image, mask = listed_file(path, pair.image), listed_file(path, pair.label)
        missing = [file.name for file in (image, mask) if not file.is_file()]
        fault = (
            BrokenSampleError("dataset.json lists a missing file", "unpack the whole data set", quoted=missing[0])
            if missing
            else None
        )
        stem = split_name(image.name)[0]
        yield Sample(site(stem), stem, subject(stem), (image,), (mask,), fault)


def _finder(option: str, options: Mapping[str, str], otherwise: str | None = None) -> Callable[[str], str]:
    """Return a function of a stem: the option's one group in it. Default: ``otherwise``, or the stem."""
    rule = options.get(option)
    if rule is None:
        return lambda stem: otherwise or stem
    try:
        compiled = re.compile(str(rule))
    except re.error as error:
        raise ConfigError(f"import_options.{option}: {rule!r} is not a regular expression: {error}") from error
    if compiled.groups != 1:
        raise ConfigError(f"import_options.{option}: {rule!r} has {compiled.groups} groups; it needs one")

    def find(stem: str) -> str:
        match = compiled.search(stem)
        if match is None or not match[1]:
            raise DataError(f"import_options.{option}: {rule!r} finds nothing in {stem!r}; fix the rule")
        return match[1]

    return find


_PATTERNS = (
    Patterns("**/dataset.json", "", site="decathlon", stem="dataset", subject="dataset", empty_without_mask=True),
)

IMPORTER = Importer(
    title="Medical Segmentation Decathlon",
    licence="see dataset.json",
    classes=(),
    patterns=_PATTERNS,
    options=("site", "subject"),
    configure=configure,
)
