"""The shipped files of ``deploy/`` and ``conf/flower`` are consistent, and unusable certificates are refused."""

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
from pydantic import ValidationError

from demo import LocalFederation
from fedsca_pipeline.errors import ConfigError
from fedsca_pipeline.flower.config import Certificates, FlowerConfig, check_certificates, read_site_config


def test_the_example_site_file_is_valid_with_its_keys_in_the_same_folder(project: Path, tmp_path: Path) -> None:
    shutil.copy(project / "deploy" / "site.yml", tmp_path)
    (tmp_path / "ca.crt").touch()
    (tmp_path / "hospital_a.key").touch()

    config = read_site_config(tmp_path / "site.yml")

    assert config.certificates.authority == tmp_path / "ca.crt"
    assert str(config.work) in writable("fedsca-site.service", project)
    unit = (project / "deploy" / "fedsca-site.service").read_text()
    assert f"\nRequiresMountsFor={config.data} {config.work}\n" in unit


def test_the_settings_of_the_coordinator_name_the_folders_of_the_systemd_units(project: Path) -> None:
    values = yaml.safe_load((project / "conf" / "flower" / "parameters.yml").read_text())
    config = FlowerConfig.model_validate(values["flower"])

    superlink = (project / "deploy" / "fedsca-superlink.service").read_text()

    assert f"--ssl-ca-certfile {config.authority} " in superlink
    assert f"ExecStart={config.engine}/flower-superlink " in superlink
    # The relay that the SuperExec starts connects to a socket in this folder.
    assert str(config.home.parent) in writable("fedsca-superexec.service", project)


def coordinator(**changed: Any) -> FlowerConfig:
    return FlowerConfig.model_validate({"authority": "ca.crt", "home": "home", **changed})


def test_sites_are_a_list_of_names_or_have_a_largest_number_of_images() -> None:
    assert coordinator(sites=["b", "a"]).sites == {"a": None, "b": None}
    assert list(coordinator(sites={"b": 40, "a": None}).sites.items()) == [("a", None), ("b", 40)]


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        (["a", "a"], "a site is listed twice"),
        ([], "at least 1"),
        ({}, "at least 1"),
        ({"a": 0}, "greater than or equal to 1"),
        ({"a b": 4}, "match pattern"),
        ([{"a": 40}], "give a list of names, or a mapping"),
        ("a", "valid dictionary"),
    ],
    ids=str,
)
def test_a_wrong_list_of_sites_is_refused(sites: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        coordinator(sites=sites)


def test_nginx_and_the_demonstration_allow_the_largest_message(project: Path) -> None:
    values = yaml.safe_load((project / "conf" / "flower" / "parameters.yml").read_text())
    shipped = FlowerConfig.model_validate(values["flower"]).max_message
    sizes = re.findall(r"^ +client_max_body_size (.+);$", (project / "deploy" / "nginx.conf").read_text(), re.MULTILINE)

    assert sizes == ["64k", f"{shipped}m"]
    assert shipped == FlowerConfig.model_fields["max_message"].default == LocalFederation.max_message


def writable(unit: str, project: Path) -> list[str]:
    """Return the folders that a systemd unit may write to."""
    return re.findall(r"^ReadWritePaths=(.+)$", (project / "deploy" / unit).read_text(), re.MULTILINE)


@pytest.fixture
def valid(certificates: Mapping[str, bytes], tmp_path: Path) -> Certificates:
    for name, content in certificates.items():
        (tmp_path / name).write_bytes(content)
    return Certificates(authority=tmp_path / "ca.crt", key=tmp_path / "a.key")


def private(key: Any) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def test_an_authority_file_with_several_certificates_is_accepted(valid) -> None:
    valid.authority.write_bytes(2 * valid.authority.read_bytes())

    check_certificates(valid)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_key_from_ssh_keygen_is_accepted_unless_it_has_a_password(valid) -> None:
    def make(password: str) -> None:
        valid.key.unlink()
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", password, "-C", "hospital_a", "-f"]
        subprocess.run([*command, str(valid.key)], check=True)

    make("")
    check_certificates(valid)

    make("a password")
    with pytest.raises(
        ConfigError, match=r"^certificates\.key: .*a\.key is not a key that Flower accepts \(.*password"
    ):
        check_certificates(valid)


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (lambda: b"", "not a key that Flower accepts"),
        (lambda: b"\xff\xfe", "not a key that Flower accepts"),
        (lambda: b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a key that Flower accepts"),
        (lambda: private(rsa.generate_private_key(65537, 2048)), "not an ECDSA key"),
        (lambda: private(ed25519.Ed25519PrivateKey.generate()), "not an ECDSA key"),
    ],
)
def test_a_key_that_a_supernode_cannot_use_is_refused_with_the_command_that_makes_one(
    valid, made: Callable[[], bytes], fault: str
) -> None:
    valid.key.write_bytes(made())

    with pytest.raises(ConfigError, match=rf"^certificates\.key: .*a\.key is .*{fault}.*ssh-keygen -t ecdsa"):
        check_certificates(valid)


@pytest.mark.parametrize("content", [b"", b"no certificate", b"\x30\x82\xff"])
def test_an_authority_file_without_a_certificate_is_refused(valid, content: bytes) -> None:
    valid.authority.write_bytes(content)

    with pytest.raises(ConfigError, match=r"^certificates\.authority: .*ca\.crt holds no certificate in PEM format"):
        check_certificates(valid)


@pytest.mark.parametrize("key", ["authority", "key"])
def test_an_unreadable_file_is_named(valid, key: str) -> None:
    file = getattr(valid, key)
    file.unlink()
    file.mkdir()

    with pytest.raises(ConfigError, match=rf"^certificates\.{key}: {re.escape(str(file))} cannot be read"):
        check_certificates(valid)
