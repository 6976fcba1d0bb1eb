"""``dvc repro`` and ``kedro viz`` in a clone of the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

TOUCHED = "meadow_mri"


@pytest.fixture(scope="module")
def clone(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which everything has been built once by ``dvc repro``."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    subprocess.run(["git", "clone", "--quiet", str(project), str(folder)], check=True)
    run(folder, "dvc", "repro")
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "KEDRO_ENV": "smoke",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def test_a_second_repro_runs_nothing_and_a_changed_site_only_what_depends_on_it(clone: Path) -> None:
    again = run(clone, "dvc", "repro")
    assert stages_run(again) == ["in_force"]

    path = next((clone / "data" / "01_raw" / TOUCHED / "images").iterdir())
    pixels = np.array(Image.open(path))
    pixels.flat[0] ^= 1
    Image.fromarray(pixels).save(path)
    changed = run(clone, "dvc", "repro")

    # The data report stands beside training; which of them comes first is DVC's to choose.
    ran = stages_run(changed)
    assert [stage for stage in ran if stage not in ("in_force", "data_report")] == [
        f"preprocessing@{TOUCHED}",
        "training",
        "evaluation",
    ]
    assert ran.count("data_report") == 1
    assert json.loads(run(clone, "dvc", "metrics", "show", "--json"))


def test_a_parameter_of_the_environment_in_force_runs_what_depends_on_it(clone: Path) -> None:
    parameters = clone / "conf" / "smoke" / "parameters.yml"
    before = parameters.read_text()
    parameters.write_text(before + "evaluation: {threshold: 0.6}\n")

    changed = stages_run(run(clone, "dvc", "repro"))
    parameters.write_text(before)

    assert changed[0] == "in_force"
    assert {"training", "evaluation"} <= {*changed}
    assert not [stage for stage in changed if stage.startswith("preprocessing")]


def test_viz_shows_the_layers_and_previews(clone: Path) -> None:
    run(clone, "kedro", "viz", "build", "--include-previews")

    graph = json.loads((clone / "build" / "api" / "main").read_text())
    previews = {
        node.get("preview_type")
        for path in (clone / "build" / "api" / "nodes").iterdir()
        for node in [json.loads(path.read_text())]
    }
    assert {"raw", "intermediate", "primary", "model_input", "models", "model_output", "reporting"} == set(
        graph["layers"]
    )
    assert {"PlotlyPreview", "ImagePreview", "TablePreview", "JSONPreview"} <= previews
