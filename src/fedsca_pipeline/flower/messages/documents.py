"""What coordinator and site tell one another beside the rounds' messages: JSON of a fixed form, and nothing else.

From a site only counts, hashes and means leave: no file name, no row of a table.
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

MOST_BYTES = 2**18
"""Of one document."""

Hash = Field(pattern=r"^[0-9a-f]{8,64}$")
Run = Annotated[str, Field(pattern=RUN_PATTERN)]
"""A run's fingerprint."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


TaskKind = Literal["prepare", "open", "round", "finish"]


class Task(_Document):
    """What a message to a site asks for, and within how many seconds; the payload is beside it.

    ``begun`` is another for every beginning of a run, by whichever coordinator, and empty before there is one.
    """

    kind: TaskKind
    round: int = Field(ge=0)
    site: str
    seconds: float = Field(gt=0.0)
    begun: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")


class Terms(_Document):
    """Coordinator to site, before a run: what the data will be used for, so that the site can prepare them."""

    configuration: dict[str, Any]
    code: str = Hash


class Prepared(_Document):
    """Site to coordinator: its data are ready. ``version`` and ``foundation`` go into the run's fingerprint.

    ``samples`` are the images and slices to train on, by which its updates are weighed.
    """

    site: SiteName
    version: str = Field(pattern=r"^[0-9a-f]{16}-[0-9a-f]{16}$")
    foundation: str = Hash
    train: int = Field(ge=1)
    samples: int = Field(ge=1)
    validation: int = Field(ge=0)
    test: int = Field(ge=0)


class Description(_Document):
    """Coordinator to site, at a run's start: all that decides its numbers, as ``runs.describe_run`` returns it."""

    fingerprint: Run
    configuration: dict[str, Any]
    data: dict[str, str]
    foundation: str = Hash
    code: str = Hash
    threads: int = Field(ge=1)

    def worked_out(self) -> str:
        """Return the fingerprint of what the description says, which an honest one carries."""
        return fingerprint(self.model_dump(exclude={"fingerprint"}))


class Opened(_Document):
    """Site to coordinator: it takes part in the run."""

    site: SiteName
    run: Run


class Finished(_Document):
    """Coordinator to site, after the last round: write the models and test them."""

    run: Run


Share = Annotated[float, Field(ge=0.0, le=1.0)]
Distance = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class _MeansRow(_Document):
    """Of one model and class of a site; ``label`` 0 is the mean over its classes, 1 the first class."""

    model: Literal["before", "after", "chosen"]
    label: int = Field(ge=0, le=254)
    one_empty: Count


class Means(_MeansRow):
    """A row of ``evaluation.tables.site_means``: over a site's test images or slices; distances in pixels."""

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
    """A row of ``evaluation.volume_tables.site_volume_means``: over a site's test volumes; distances in mm."""

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
    """Site to coordinator: what its models reached, ``volumes`` where it has some.

    ``rounds`` and ``dice_validation`` are of the kept snapshots.
    """

    site: SiteName
    run: Run
    means: list[Means]
    volumes: list[VolumeMeans]
    rounds: dict[Snapshot, int]
    dice_validation: dict[Snapshot, float | None]

    def check_classes(self, classes: int) -> None:
        """Do nothing where there is at most one row a model and class, of a run with so many classes.

        Raises:
            MessageError: there are others.
        """
        known = range(classes + 1) if classes > 1 else (0,)
        for rows in (self.means, self.volumes):
            keys = [(row.model, row.label) for row in rows]
            if len(set(keys)) < len(keys) or any(label not in known for _, label in keys):
                raise MessageError(f"Scores: rows of other classes than {classes}, or two of one")


ANSWERS: Mapping[str, type[_Document]] = MappingProxyType({"prepare": Prepared, "open": Opened, "finish": Scores})
"""All that leaves a site beside the answers to rounds, by kind of task."""

D = TypeVar("D", bound=_Document)


def write(document: BaseModel) -> bytes:
    """Return a document's JSON."""
    return document.model_dump_json().encode()


def read(kind: type[D], data: bytes) -> D:
    """Return the document in ``data``.

    Raises:
        MessageError: it is larger than ``MOST_BYTES``, or has not exactly this form.
    """
    if len(data) > MOST_BYTES:
        raise MessageError(f"a document of {len(data)} bytes is larger than the {MOST_BYTES} allowed")
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _unlike(kind, error) from error


def read_task(header: Mapping[str, Any]) -> Task:
    """Return the task that a message's header asks for.

    Raises:
        MessageError: it has not exactly the form of one.
    """
    try:
        return Task.model_validate(header)
    except ValidationError as error:
        raise _unlike(Task, error) from error


def settings(configuration: Mapping[str, Any]) -> Settings:
    """Return the settings of a configuration from the wire.

    Raises:
        MessageError: a key is missing or unknown, or a value is out of range.
    """
    if configuration.keys() != Settings.model_fields.keys():
        raise MessageError(
            f"a configuration with the keys {sorted(configuration)}, not {sorted(Settings.model_fields)}"
        )
    strategies = configuration["strategies"]
    if not isinstance(strategies, dict) or not all(isinstance(options, dict) for options in strategies.values()):
        raise MessageError("a configuration whose strategies are not options by name of the strategy")
    try:
        return Settings.model_validate(configuration)
    except ValidationError as error:
        raise MessageError(
            f"a configuration that this version does not understand: {'; '.join(faults_by_key(error))}"
        ) from error


def _unlike(kind: type[_Document], error: ValidationError) -> MessageError:
    faults = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'JSON'}: {fault['msg']}" for fault in error.errors())
    return MessageError(f"{kind.__name__}: {faults}")
