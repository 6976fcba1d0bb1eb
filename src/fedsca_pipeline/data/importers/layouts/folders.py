"""Any folder, by a YAML file of patterns: ``import_options.layout``. Default: ``import.yml`` in the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedsca_pipeline.data.importers.layout import Importer, Patterns, Watch
from fedsca_pipeline.data.importers.masks import Label, colours, objects, seen_values, stored_values, two_values
from fedsca_pipeline.data.importers.sample import Sample
from fedsca_pipeline.data.importers.tables import check_inside, listed_file, read_table
from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.site_folder.label_rule import number_of
from fedsca_pipeline.data.site_folder.yaml_document import RepeatedKeyError, load_yaml
from fedsca_pipeline.errors import ConfigError, faults_by_key

Class = Annotated[int, Field(ge=0, le=254)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    images: str
    masks: str
    site: str = "{site}"
    stem: str = "{stem}"
    subject: str = "{stem}"
    joined: bool = False
    empty_without_mask: bool = False


class _Table(BaseModel):
    """A CSV or TSV below the source, one row per subject; ``key`` is the column of the patterns' ``subject``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    key: str
    site: str

    def sites(self, source: Path, samples: list[Sample]) -> Iterator[Sample]:
        """Yield each sample with the site of its subject's row; without a row it is broken."""
        path = listed_file(source / "import.yml", self.file)
        check_inside(source, path)
        rows = read_table(path, self.key, (self.site,))
        for sample in samples:
            site = rows[sample.subject][self.site] if sample.subject in rows else "n/a"
            if site == "n/a":
                fault = BrokenSampleError(
                    f"{self.file} has no {self.site} for its subject",
                    "add it, or delete the image",
                    quoted=repr(sample.subject),
                )
                yield replace(sample, fault=sample.fault or fault)
            else:
                yield replace(sample, site=site)


class Layout(BaseModel):
    """The keys of a layout file. One of ``values``, ``indices``, ``colours`` and ``objects`` describes the masks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patterns: tuple[_Part, ...] = Field(min_length=1)
    table: _Table | None = None
    classes: tuple[str, ...] = ("foreground",)
    values: dict[int, Class] | None = Field(None, description="visible grey value: class; unnamed 0 is background")
    indices: dict[int, Class] | None = Field(
        None, description="stored number (palette index): class; unnamed 0 is background"
    )
    colours: dict[str, Class] | None = Field(None, description="'#rrggbb': class")
    objects: bool = Field(False, description="whether masks number their objects, and all but 0 is foreground")
    title: str = "a folder of your own"
    licence: str = "not stated"

    @field_validator("colours")
    @classmethod
    def _written_so(cls, value: dict[str, int] | None) -> dict[str, int] | None:
        for colour in value or {}:
            number_of(colour)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Layout:
        maps = [given for given in (self.values, self.indices, self.colours) if given is not None]
        if len(maps) + self.objects > 1:
            raise ValueError("give one of values, indices, colours and objects")
        if not maps and len(self.classes) > 1:
            raise ValueError("several classes need values, indices or colours")
        if beyond := [number for given in maps for number in given.values() if number > len(self.classes)]:
            raise ValueError(f"class {beyond[0]}, but classes names {len(self.classes)}")
        return self

    def label(self) -> Label:
        """Return the label of the masks. Default: two values, foreground from half the range on."""
        if self.objects:
            return objects()
        if self.values is not None:
            return seen_values({0: 0} | self.values)
        if self.indices is not None:
            return stored_values({0: 0} | self.indices)
        if self.colours is not None:
            return colours(self.colours)
        return two_values()


def configure(source: Path, options: Mapping[str, str], __: Watch) -> Importer:
    """Return the importer that the layout file describes.

    Raises:
        ConfigError: the file is missing, not YAML, or has a wrong key, or one twice; the message names both.
    """
    path = Path(options.get("layout", source / "import.yml"))
    try:
        layout = Layout.model_validate(load_yaml(path.read_text(encoding="utf-8")) or {})
        return Importer(
            title=layout.title,
            licence=layout.licence,
            classes=layout.classes,
            label=layout.label(),
            patterns=tuple(Patterns(**part.model_dump()) for part in layout.patterns),
            refine=layout.table.sites if layout.table else None,
        )
    except ValidationError as error:
        faults = "; ".join(faults_by_key(error))
        raise ConfigError(f"{path}: {faults}. Known keys: {', '.join(Layout.model_fields)}") from error
    except (ConfigError, RepeatedKeyError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; importer 'folders' needs a layout file there, or its path in import_options.layout "
            "(docs/importing.md)"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from error


IMPORTER = Importer(
    title="a folder of your own",
    licence="not stated",
    classes=(),
    patterns=(),
    options=("layout",),
    configure=configure,
)
