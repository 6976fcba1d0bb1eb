"""The wheel of ``kedro package``, with the configuration beside it and no project folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def packaged(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel, as ``installed``, and the configuration as ``kedro package`` packs it."""
    folder = tmp_path_factory.mktemp("packaged")
    source = folder / "source"
    shutil.copytree(project / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(project / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    pack = ["tar", "--exclude=local/*.yml", "-czf", str(folder / "conf.tar.gz"), f"--directory={project}", "conf"]
    subprocess.run(pack, check=True)
    return folder


def test_the_wheel_has_every_file_of_the_package(project: Path, packaged: Path) -> None:
    def files(root: Path) -> set[Path]:
        return {
            path.relative_to(root) for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(project / "src" / "fedsca_pipeline") == files(packaged / "installed" / "fedsca_pipeline")


def test_the_wheel_runs_elsewhere_with_its_configuration(packaged: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(packaged / "installed"), "OMP_WAIT_POLICY": "passive"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "fedsca_pipeline", f"--conf-source={packaged / 'conf.tar.gz'}", "--env=smoke"]
    command += ["--pipeline=federated_training", "--params=federation.rounds=1"]

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Test results per site" in done.stdout
    assert (tmp_path / "data" / "smoke" / "06_models" / "meadow_mri" / "site_model.json").is_file()
    assert (tmp_path / "mlflow.db").is_file()
