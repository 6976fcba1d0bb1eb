"""The files of ``deploy/`` and ``conf/flower`` as they are shipped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from fedsca_pipeline.flower.config import FlowerConfig, read_site_config


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
