"""The typed configuration of a deployed federation: the coordinator's parameters ``flower``, and a site's YAML file."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedsca_pipeline.config import PrivacyBound
from fedsca_pipeline.errors import ConfigError

SITE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
SiteName = Annotated[str, Field(pattern=SITE_PATTERN)]
_MIB = 2**20


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FlowerConfig(_Config):
    """``flower``: how the coordinator reaches its sites. Paths are relative to the project."""

    sites: list[SiteName] = Field(
        min_length=1, description="the hospitals, by the names their keys are registered under"
    )
    superlink: str = Field("127.0.0.1:8000", pattern=r"^.+:\d+$", description="host:port of the SuperLink, on loopback")
    authority: Path = Field(description="certificate of the authority that signed the SuperLink's")
    engine: Path | None = Field(None, description="bin folder of the environment that flwr is in; null: this one")
    home: Path = Field(description="folder for Flower's files, the relay's socket, the lock and the audit log")
    max_message: int = Field(256, ge=1, le=2047, description="MiB, of one message")
    poll: float = Field(0.5, gt=0.0, le=60.0, description="s between two looks for answers")
    retry: float = Field(30.0, gt=0.0, description="s until a site that failed, or the SuperLink, is tried again")
    connect: float = Field(120.0, gt=0.0, description="s that the SuperLink may take to start a run")

    @property
    def most_bytes(self) -> int:
        """The limit of one message in bytes."""
        return self.max_message * _MIB

    @property
    def audit(self) -> Path:
        """Where the coordinator's audit log lies."""
        return self.home / "audit.jsonl"

    @field_validator("sites")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("a site is named twice")
        return sorted(value)


class Certificates(_Config):
    """``certificates`` of a site."""

    authority: Path = Field(description="certificate of the authority that signed the coordinator's")
    key: Path = Field(description="this site's private key, by ssh-keygen -t ecdsa -b 384")


class Resources(_Config):
    """``resources`` of a site."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    most_threads: int | None = Field(None, ge=1, description="a run that asks for more torch threads is refused")
    memory: float | None = Field(None, gt=0.0, description="GiB that the worker may take; null: no limit")
    task_seconds: float = Field(
        43_200.0, gt=0.0, description="a task that takes longer is ended, whatever its round says"
    )
    max_message: int = Field(256, ge=1, le=2047, description="MiB, of one message")

    @property
    def most_bytes(self) -> int:
        """The limit of one message in bytes."""
        return self.max_message * _MIB


class SiteConfig(_Config):
    """A site's YAML file. Paths are relative to the file's folder."""

    site: SiteName
    data: Path = Field(description="folder with images/, masks/ and, if need be, site.yml")
    work: Path = Field(description="folder for all that this site writes: arrays, states, models, scores, logs")
    coordinator: str = Field(pattern=r"^.+:\d+$", description="host:port, the coordinator's public one")
    certificates: Certificates
    resources: Resources = Resources()
    privacy: PrivacyBound | None = Field(None, description="the most given away over all runs; null: as a run says")
    foundations: Path | None = Field(None, description="folder of foundation weights; null: in work")
    engine: Path | None = Field(None, description="bin folder of the environment that flwr is in; null: this one")

    @property
    def audit(self) -> Path:
        """Where this site's audit log lies."""
        return self.work / "audit.jsonl"

    @property
    def foundation_root(self) -> Path:
        """Where foundation weights lie."""
        return self.foundations or self.work / "02_intermediate" / "_foundations"


def read_site_config(path: Path) -> SiteConfig:
    """Read a site's YAML file.

    Raises:
        ConfigError: it is missing, no YAML, or a key is unknown, missing or wrong; or a file it names is not there.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); deploy/site.yml is an example") from error
    try:
        config = SiteConfig.model_validate(_resolved(values, path.resolve().parent))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ConfigError(f"{path}: {faults}") from error
    if config.work.resolve().is_relative_to(config.data.resolve()):
        raise ConfigError(f"{path}: work: {config.work} lies in the data folder, where nothing may be written; move it")
    for key, file in (("authority", config.certificates.authority), ("key", config.certificates.key)):
        if not file.is_file():
            raise ConfigError(f"{path}: certificates.{key}: there is no file {file}")
    return config


def check_certificates(certificates: Certificates) -> None:
    """Do nothing where Flower can use a site's files; with others its SuperNode would end, or never connect, for ever.

    Raises:
        ConfigError: naming the file, what is wrong with it, and the cure.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    authority = _content("authority", certificates.authority)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authority.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"certificates.authority: {certificates.authority} holds no certificate in PEM form ({error}); it is the "
            "coordinator's ca.crt"
        ) from error
    try:
        key = load_ssh_private_key(_content("key", certificates.key), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(certificates.key, str(error)) from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise _unusable(certificates.key, "it is of another kind")


def _content(key: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"certificates.{key}: {file} cannot be read ({error.strerror}); let the user who runs this read it"
        ) from error


def _unusable(key: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"certificates.key: {key} is no key that Flower takes ({reason}); make one with "
        'ssh-keygen -t ecdsa -b 384 -N "", and have the coordinator register its .pub'
    )


_PATHS = ("data", "work", "foundations", "engine", "authority", "key")


def _resolved(value: Any, folder: Path) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / Path(entry).expanduser())
        if key in _PATHS and isinstance(entry, str)
        else _resolved(entry, folder)
        for key, entry in value.items()
    }
