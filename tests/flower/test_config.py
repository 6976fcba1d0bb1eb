"""The files of ``deploy/`` and ``conf/flower`` as they are shipped."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.flower.config import Certificates, FlowerConfig, check_certificates, read_site_config


def test_the_example_site_file_is_read_with_its_keys_beside_it(project: Path, tmp_path: Path) -> None:
    shutil.copy(project / "deploy" / "site.yml", tmp_path)
    (tmp_path / "ca.crt").touch()
    (tmp_path / "hospital_a.key").touch()

    config = read_site_config(tmp_path / "site.yml")

    assert config.certificates.authority == tmp_path / "ca.crt"
    assert str(config.work) in writable("fedsca-site.service", project)
    unit = (project / "deploy" / "fedsca-site.service").read_text()
    assert f"\nRequiresMountsFor={config.data} {config.work}\n" in unit


def test_the_coordinators_settings_name_the_folders_of_the_units(project: Path) -> None:
    values = yaml.safe_load((project / "conf" / "flower" / "parameters.yml").read_text())
    config = FlowerConfig.model_validate(values["flower"])

    superlink = (project / "deploy" / "fedsca-superlink.service").read_text()

    assert f"--ssl-ca-certfile {config.authority} " in superlink
    assert f"ExecStart={config.engine}/flower-superlink " in superlink
    # Its SuperExec's relay connects to the socket there.
    assert str(config.home.parent) in writable("fedsca-superexec.service", project)


def writable(unit: str, project: Path) -> list[str]:
    """Return the folders that a unit may write to."""
    return re.findall(r"^ReadWritePaths=(.+)$", (project / "deploy" / unit).read_text(), re.MULTILINE)


@pytest.fixture
def own(certificates: Mapping[str, bytes], tmp_path: Path) -> Certificates:
    for name, content in certificates.items():
        (tmp_path / name).write_bytes(content)
    return Certificates(authority=tmp_path / "ca.crt", key=tmp_path / "a.key")


def private(key: Any) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def test_an_authority_of_several_certificates_is_taken(own) -> None:
    own.authority.write_bytes(2 * own.authority.read_bytes())

    check_certificates(own)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen here")
def test_a_key_as_ssh_keygen_makes_it_is_taken_but_for_one_with_a_password(own) -> None:
    def make(password: str) -> None:
        own.key.unlink()
        command = [
            "ssh-keygen",
            "-q",
            "-t",
            "ecdsa",
            "-b",
            "384",
            "-N",
            password,
            "-C",
            "hospital_a",
            "-f",
            str(own.key),
        ]
        subprocess.run(command, check=True)

    make("")
    check_certificates(own)

    make("a password")
    with pytest.raises(ConfigError, match=r"^certificates\.key: .*a\.key is no key that Flower takes \(.*password"):
        check_certificates(own)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: b"", "no key that Flower takes"),
        (lambda: b"\xff\xfe", "no key that Flower takes"),
        (lambda: b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no key that Flower takes"),
        (lambda: private(rsa.generate_private_key(65537, 2048)), "another kind"),
        (lambda: private(ed25519.Ed25519PrivateKey.generate()), "another kind"),
    ],
)
def test_a_key_that_a_supernode_would_end_over_is_refused_with_how_to_make_one(
    own, made: Callable[[], bytes], said: str
) -> None:
    own.key.write_bytes(made())

    with pytest.raises(ConfigError, match=rf"^certificates\.key: .*a\.key is .*{said}.*ssh-keygen -t ecdsa"):
        check_certificates(own)


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\x30\x82\xff"])
def test_an_authority_that_holds_no_certificate_is_refused(own, content: bytes) -> None:
    own.authority.write_bytes(content)

    with pytest.raises(ConfigError, match=r"^certificates\.authority: .*ca\.crt holds no certificate in PEM form"):
        check_certificates(own)


@pytest.mark.parametrize("key", ["authority", "key"])
def test_a_file_that_cannot_be_read_is_named(own, key: str) -> None:
    file = getattr(own, key)
    file.unlink()
    file.mkdir()

    with pytest.raises(ConfigError, match=rf"^certificates\.{key}: {re.escape(str(file))} cannot be read"):
        check_certificates(own)
