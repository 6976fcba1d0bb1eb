"""``site.yml``: a site's label map, subjects, spacing and notes."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.site_folder.discovery import is_own_file
from fedsca_pipeline.data.site_folder.label_rule import LabelRule, number_of
from fedsca_pipeline.data.site_folder.yaml_document import RepeatedKeyError, load_yaml
from fedsca_pipeline.errors import DataError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

# Bytes: enough for `subjects` of 200,000 images.
_LARGEST = 2**24

Class = Annotated[int, Field(ge=0, le=254)]


class SiteFile(BaseModel):
    """The optional keys of ``site.yml``. Without the file, every image is its own subject."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label_map: dict[int | str, Class] = Field(
        default_factory=dict,
        description="raw value or colour '#rrggbb': class; values not named stay as they are",
    )
    mask_threshold: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="for masks of two values: class 1 from this grey value on"
    )
    group: str | None = Field(
        None, description="regular expression with one group, which finds the subject in the stem"
    )
    subjects: dict[str, str] | None = Field(None, description="stem: subject, for every image")
    spacing: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = Field(
        None, description="mm per pixel: [row, column]"
    )
    notes: str = ""
    hide_names: bool = Field(
        False, description="true: names may identify patients, so only an import may read the site (docs/dicom.md)"
    )
    hashed_names: bool = Field(False, description="true: stems and subjects are salted hashes; import_sites writes it")

    @field_validator("label_map", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("is empty; a colour has to be quoted, '#ff0000': 1, or YAML takes it for a comment")
        return value

    @field_validator("label_map")
    @classmethod
    def _numbers_or_colours(cls, value: dict[int | str, int]) -> dict[int | str, int]:
        found: dict[int | str, int] = {}
        for raw, number in value.items():
            key = _label_key(raw)
            if found.get(key, number) != number:
                raise ValueError(f"{raw} has two classes, {found[key]} and {number}")
            found[key] = number
        return found

    @field_validator("subjects")
    @classmethod
    def _composed(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        """Return stems and subjects in NFC, as stems of files are."""
        found: dict[str, str] = {}
        for raw, subject in (value or {}).items():
            stem, subject = unicodedata.normalize("NFC", raw), unicodedata.normalize("NFC", subject)
            if found.setdefault(stem, subject) != subject:
                raise ValueError(f"{stem} has two subjects, {found[stem]} and {subject}")
            if not subject.isprintable():
                raise ValueError(f"the subject of {stem} holds unprintable characters, which no table keeps")
        return value and found

    @field_validator("group")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        value = unicodedata.normalize("NFC", value)
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"needs exactly one capturing group, has {groups}; for instance '^(p[0-9]+)_'")
        return value

    @model_validator(mode="after")
    def _one_rule(self) -> SiteFile:
        if self.group is not None and self.subjects is not None:
            raise ValueError("give group or subjects, not both")
        if self.label_map and self.mask_threshold is not None:
            raise ValueError("give label_map or mask_threshold, not both")
        return self

    @property
    def label_rule(self) -> LabelRule:
        """The rule by which the site's masks are read."""
        return LabelRule(
            numbers={key: number for key, number in self.label_map.items() if isinstance(key, int)},
            colours={key: number for key, number in self.label_map.items() if isinstance(key, str)},
            threshold=self.mask_threshold,
        )

    @property
    def split_rule(self) -> str | None:
        """The rule that names subjects; None: every image is its own subject."""
        return "subjects of site.yml" if self.subjects is not None else self.group

    def subject(self, stem: str) -> str:
        """Return the subject of an image.

        Raises:
            BrokenSampleError: the rule does not cover this stem (a guess could leak a patient from training into
                test).
        """
        if self.subjects is not None:
            if stem not in self.subjects:
                raise BrokenSampleError("site.yml's subjects do not name it", "add its stem there")
            return self.subjects[stem]
        if self.group is None:
            return stem
        match = re.search(self.group, stem)
        if match is None or not match.group(1):
            raise BrokenSampleError(
                f"site.yml's group rule {self.group!r} finds no subject in {stem!r}", "fix the rule or the file name"
            )
        return match.group(1)


def _label_key(raw: int | str) -> int | str:
    """Return a key of ``label_map`` as number, or as colour in small letters."""
    if isinstance(raw, int) or re.fullmatch(r"-?\d+", raw):
        return int(raw)
    if not raw.startswith("#"):
        raise ValueError(f"{raw!r} is neither a whole number nor a colour '#rrggbb'")
    number_of(raw)
    return raw.lower()


def read_site_file(folder: Path, *, terse: bool = False) -> SiteFile:
    """Read ``site.yml`` of a site folder; the defaults if there is none.

    ``terse``: errors quote nothing from the file, since stems and subjects may name patients.

    Raises:
        DataError: it is not YAML, or a key is unknown, wrong or there twice; the message names the file and the key.
    """
    path = folder / "site.yml"
    if (folder / "site.yaml").exists():
        raise DataError(f"{folder / 'site.yaml'}: this file is called site.yml; rename it")
    if not path.exists() and not path.is_symlink():
        return SiteFile()
    if not is_own_file(path, folder):
        raise DataError(f"{path}: not a file of this site; put the file itself there, or delete it")
    if path.stat().st_size > _LARGEST:
        raise DataError(f"{path}: larger than {_LARGEST:,} bytes, which is no site.yml; fix or delete it")
    try:
        # A stem such as 0012 stays 0012.
        content = load_yaml(path.read_text("utf-8"), typed=False)
        return SiteFile.model_validate(content or {})
    except ValidationError as error:
        problems = "; ".join((_problem_without_values if terse else _problem)(detail) for detail in error.errors())
        known = ", ".join(SiteFile.model_fields)
        raise DataError(f"{path}: {problems}. Known keys: {known}") from (None if terse else error)
    except RepeatedKeyError as error:
        reason = f"a key is there twice, the second time in line {error.line}; keep one" if terse else str(error)
        raise DataError(f"{path}: {reason}") from (None if terse else error)
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        detail = type(error).__name__ if terse else " ".join(str(error).split())
        cure = "fix it (a colour needs quotes: '#ff0000'), or delete it"
        raise DataError(f"{path}: not readable YAML ({detail}); {cure}") from (None if terse else error)


def _problem(detail: ErrorDetails) -> str:
    return f"{'.'.join(str(part) for part in detail['loc']) or 'site.yml'}: {detail['msg']}"


def _problem_without_values(detail: ErrorDetails) -> str:
    """Return the fault with a known key only; other text may be a patient's name."""
    key = detail["loc"][0] if detail["loc"] else None
    return f"{key if key in SiteFile.model_fields else 'a key'}: not as it has to be ({detail['type']})"
