"""Settings of a deployed federation: the coordinator's parameter group ``flower`` and the YAML file of a site."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedsca_pipeline.config import PrivacyBound
from fedsca_pipeline.data.site_folder.yaml_document import load_yaml
from fedsca_pipeline.errors import ConfigError, faults_by_key

SITE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
SiteName = Annotated[str, Field(pattern=SITE_PATTERN)]
_MIB = 2**20


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FlowerConfig(_Config):
    """``flower``: how the coordinator reaches the sites. Paths are relative to the project."""

    sites: dict[SiteName, Annotated[int, Field(ge=1)] | None] = Field(
        min_length=1,
        description="names under which the keys of the hospitals are registered; a list, or each name with the largest "
        "number of training images and slices that the hospital may claim, null: any",
    )
    superlink: str = Field("127.0.0.1:8000", pattern=r"^.+:\d+$", description="host:port of the SuperLink, on loopback")
    authority: Path = Field(description="certificate of the authority that signed the SuperLink's certificate")
    engine: Path | None = Field(None, description="bin folder of the environment that flwr is in; null: this one")
    home: Path = Field(description="folder for Flower's files, the relay's socket, the lock and the audit log")
    max_message: int = Field(8, ge=1, le=2047, description="largest message, in MiB")
    poll: float = Field(0.5, gt=0.0, le=60.0, description="seconds between two polls for answers")
    retry: float = Field(30.0, gt=0.0, description="seconds before a failed site or the SuperLink is tried again")
    connect: float = Field(120.0, gt=0.0, description="seconds that the SuperLink may take to start a run")

    @property
    def max_message_bytes(self) -> int:
        """The limit of one message in bytes."""
        return self.max_message * _MIB

    @property
    def audit(self) -> Path:
        """Path of the coordinator's audit log."""
        return self.home / "audit.jsonl"

    @field_validator("sites", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not all(isinstance(name, str) for name in value):
            raise ValueError("give a list of names, or a mapping of each name to a number of images or null")
        if len(set(value)) < len(value):
            raise ValueError("a site is listed twice")
        return dict.fromkeys(value)

    @field_validator("sites")
    @classmethod
    def _sorted(cls, value: dict[str, int | None]) -> dict[str, int | None]:
        return dict(sorted(value.items()))


class Certificates(_Config):
    """``certificates`` in a site's YAML file."""

    authority: Path = Field(description="certificate of the authority that signed the coordinator's certificate")
    key: Path = Field(description="private key of this site, made with ssh-keygen -t ecdsa -b 384")


class Resources(_Config):
    """``resources`` in a site's YAML file."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    most_threads: int | None = Field(None, ge=1, description="runs that need more torch threads are refused")
    memory: float | None = Field(None, gt=0.0, description="largest memory of the worker, in GiB; null: no limit")
    task_seconds: float = Field(
        43_200.0, gt=0.0, description="a task that takes longer is stopped, even if its round allows more"
    )
    max_message: int = Field(256, ge=1, le=2047, description="largest message, in MiB")

    @property
    def max_message_bytes(self) -> int:
        """The limit of one message in bytes."""
        return self.max_message * _MIB


class SiteConfig(_Config):
    """The YAML file of a site. Paths are relative to the folder of the file."""

    site: SiteName
    data: Path = Field(description="folder with images/, masks/ and, if needed, site.yml")
    work: Path = Field(description="folder for everything that this site writes: arrays, states, models, scores, logs")
    coordinator: str = Field(pattern=r"^.+:\d+$", description="public host:port of the coordinator")
    certificates: Certificates
    resources: Resources = Resources()
    privacy: PrivacyBound | None = Field(None, description="privacy bound over all runs; null: each run decides")
    foundations: Path | None = Field(None, description="folder of foundation weights; null: a folder in work")
    engine: Path | None = Field(None, description="bin folder of the environment that flwr is in; null: this one")

    @property
    def audit(self) -> Path:
        """Path of this site's audit log."""
        return self.work / "audit.jsonl"

    @property
    def foundation_root(self) -> Path:
        """Folder of the foundation weights."""
        return self.foundations or self.work / "02_intermediate" / "_foundations"


def read_site_config(path: Path) -> SiteConfig:
    """Return the settings in a site's YAML file.

    Raises:
        ConfigError: the file is missing or is not YAML, a key is unknown, missing, wrong or there twice, or a file that
            it names is missing.
    """
    try:
        values = load_yaml(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); deploy/site.yml is an example") from error
    try:
        config = SiteConfig.model_validate(_resolved(values, path.resolve().parent))
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(faults_by_key(error))}") from error
    if config.work.resolve().is_relative_to(config.data.resolve()):
        raise ConfigError(f"{path}: work: {config.work} is inside the data folder, which is never written to; move it")
    for key, file in (("authority", config.certificates.authority), ("key", config.certificates.key)):
        if not file.is_file():
            raise ConfigError(f"{path}: certificates.{key}: {file} does not exist")
    return config


def check_certificates(certificates: Certificates) -> None:
    """Check that Flower can use the certificate and the key of a site.

    With other files the SuperNode would exit or would never connect.

    Raises:
        ConfigError: a file cannot be used; the message names it, the fault and the fix.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    authority = _read("authority", certificates.authority)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authority.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"certificates.authority: {certificates.authority} holds no certificate in PEM format ({error}); use the "
            "coordinator's ca.crt"
        ) from error
    try:
        key = load_ssh_private_key(_read("key", certificates.key), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(certificates.key, str(error)) from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise _unusable(certificates.key, "it is not an ECDSA key")


def _read(key: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"certificates.{key}: {file} cannot be read ({error.strerror}); give read access to the user that runs this"
        ) from error


def _unusable(key: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"certificates.key: {key} is not a key that Flower accepts ({reason}); make one with "
        'ssh-keygen -t ecdsa -b 384 -N "" and have the coordinator register its .pub file'
    )


_PATHS = ("data", "work", "foundations", "engine", "authority", "key")


def _resolved(value: Any, folder: Path) -> Any:
    """Return YAML values with every relative path resolved against ``folder``."""
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / Path(entry).expanduser())
        if key in _PATHS and isinstance(entry, str)
        else _resolved(entry, folder)
        for key, entry in value.items()
    }
