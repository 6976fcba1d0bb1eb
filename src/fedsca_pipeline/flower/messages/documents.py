"""The documents that coordinator and sites exchange in addition to the messages of the rounds: JSON of fixed forms.

Only counts, hashes and means leave a site, never a file name or a row of a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedsca_pipeline.config import Settings
from fedsca_pipeline.errors import MessageError, faults_by_key
from fedsca_pipeline.files import fingerprint
from fedsca_pipeline.flower.config import SiteName

RUN_PATTERN = r"^[0-9a-f]{16}$"

MAX_BYTES = 2**18
"""Largest size of a document."""

UNKNOWN_RUN = "unknown run"
"""Start of a site's failure that is solved by opening the run at the site."""

Hash = Field(pattern=r"^[0-9a-f]{8,64}$")
Run = Annotated[str, Field(pattern=RUN_PATTERN)]
"""Fingerprint of a run."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


TaskKind = Literal["prepare", "open", "round", "finish"]


class Task(_Document):
    """The header of a message to a site: the task and the seconds that it may take. The payload is separate.

    ``begun`` identifies one start of a run: it differs if a run is restarted from scratch or started by another
    coordinator. It is empty before a run starts.
    """

    kind: TaskKind
    round: int = Field(ge=0)
    site: str
    seconds: float = Field(gt=0.0)
    begun: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")


class PrepareRequest(_Document):
    """Coordinator to site, before a run: the configuration for which the site prepares its data."""

    configuration: dict[str, Any]
    code: str = Hash


class Prepared(_Document):
    """Site to coordinator: the data are ready. ``version`` and ``foundation`` are part of the run's fingerprint.

    ``samples`` is the number of training images and slices, by which the updates of the site are weighted.
    """

    site: SiteName
    version: str = Field(pattern=r"^[0-9a-f]{16}-[0-9a-f]{16}$")
    foundation: str = Hash
    train: int = Field(ge=1)
    samples: int = Field(ge=1)
    validation: int = Field(ge=0)
    test: int = Field(ge=0)


class Description(_Document):
    """Coordinator to site, at the start of a run: everything that determines its results, from ``run.describe_run``."""

    fingerprint: Run
    configuration: dict[str, Any]
    data: dict[str, str]
    foundation: str = Hash
    code: str = Hash
    threads: int = Field(ge=1)

    def expected_fingerprint(self) -> str:
        """Return the fingerprint computed from the content; an honest description has the same ``fingerprint``."""
        return fingerprint(self.model_dump(exclude={"fingerprint"}))


class Opened(_Document):
    """Site to coordinator: the site takes part in the run."""

    site: SiteName
    run: Run


class FinishRequest(_Document):
    """Coordinator to site, after the last round: write and test the models."""

    run: Run


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Distance = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class _MeansRow(_Document):
    """Test results of one model and class of a site; ``label`` 0 is the mean over the classes, 1 the first class."""

    model: Literal["before", "after", "chosen"]
    label: int = Field(ge=0, le=254)
    one_empty: Count


class Means(_MeansRow):
    """A row of ``evaluation.tables.site_means``: means over a site's test images or slices, distances in pixels."""

    dice: Share
    iou: Share
    hd95: Distance
    asd: Distance
    dice_std: Distance
    iou_std: Distance
    hd95_std: Distance
    asd_std: Distance
    images: Count


class VolumeMeans(_MeansRow):
    """A row of ``evaluation.volume_tables.site_volume_means``: means over a site's test volumes, distances in mm."""

    dice: Share
    hd95_mm: Distance
    asd_mm: Distance
    nsd: Share
    dice_std: Distance
    hd95_mm_std: Distance
    asd_mm_std: Distance
    nsd_std: Distance
    volumes: Count


Snapshot = Literal["best", "last"]


class Scores(_Document):
    """Site to coordinator: test results of its models; ``volumes`` has rows if the site has volumes.

    ``rounds`` and ``dice_validation`` describe the saved snapshots.
    """

    site: SiteName
    run: Run
    means: list[Means]
    volumes: list[VolumeMeans]
    rounds: dict[Snapshot, int]
    dice_validation: dict[Snapshot, float | None]

    def check_classes(self, classes: int) -> None:
        """Check that each model has at most one row per class, for a run with this number of classes.

        Raises:
            MessageError: a row is of another class or occurs twice.
        """
        known = range(classes + 1) if classes > 1 else (0,)
        for rows in (self.means, self.volumes):
            keys = [(row.model, row.label) for row in rows]
            if len(set(keys)) < len(keys) or any(label not in known for _, label in keys):
                raise MessageError(
                    f"Scores: rows of other classes than the {classes} of the run, or two rows of one class"
                )


ANSWERS: Mapping[str, type[_Document]] = MappingProxyType({"prepare": Prepared, "open": Opened, "finish": Scores})
"""The documents that may leave a site, by kind of task."""

D = TypeVar("D", bound=_Document)


def write(document: BaseModel) -> bytes:
    """Return a document as JSON."""
    return document.model_dump_json().encode()


def read(kind: type[D], data: bytes) -> D:
    """Return the document in ``data``.

    Raises:
        MessageError: the document is larger than ``MAX_BYTES`` or does not have exactly this form.
    """
    if len(data) > MAX_BYTES:
        raise MessageError(f"a document of {len(data)} bytes is larger than the {MAX_BYTES} allowed")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _wrong_form(kind, error) from error


def read_task(header: Mapping[str, Any]) -> Task:
    """Return the task in the header of a message.

    Raises:
        MessageError: the header does not have exactly the form of a task.
    """
    try:
        return Task.model_validate(header)
    except ValidationError as error:
        raise _wrong_form(Task, error) from error


def settings(configuration: Mapping[str, Any]) -> Settings:
    """Return the settings of a received configuration.

    Raises:
        MessageError: a key is missing or unknown, or a value is invalid.
    """
    if configuration.keys() != Settings.model_fields.keys():
        raise MessageError(
            f"the configuration has the keys {sorted(configuration)}, not {sorted(Settings.model_fields)}"
        )
    strategies = configuration["strategies"]
    if not isinstance(strategies, dict) or not all(isinstance(options, dict) for options in strategies.values()):
        raise MessageError("strategies in the configuration do not map names of strategies to options")
    try:
        return Settings.model_validate(configuration)
    except ValidationError as error:
        raise MessageError(
            f"this version does not understand the configuration: {'; '.join(faults_by_key(error))}"
        ) from error


def _wrong_form(kind: type[_Document], error: ValidationError) -> MessageError:
    # Without the values given, which errors.faults_by_key shows: they can be private, and as large as the document.
    faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'JSON'}: {fault['msg']}" for fault in error.errors())
    return MessageError(f"{kind.__name__}: {faults}")
