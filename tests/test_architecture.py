"""Who may import whom, and what the command line may not wait for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "mlflow", "monai", "transformers", "peft", "pandas", "onnx", "matplotlib", "plotly", "skimage")


def test_import_contracts_are_kept(project: Path) -> None:
    lint = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run([lint, "--no-cache"], cwd=project, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module", ["settings", "hooks.tracking", "pipeline_registry", "cli", "config", "federation.run"]
)
def test_starting_the_command_line_imports_nothing_heavy(project: Path, module: str) -> None:
    code = f"import json, sys, fedsca_pipeline.{module}; print(json.dumps(sorted(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)

    assert set(HEAVY) & set(json.loads(done.stdout)) == set()


def test_listing_the_pipelines_imports_nothing_heavy(project: Path) -> None:
    code = (
        "import json, sys; from kedro.framework.startup import bootstrap_project; "
        f"bootstrap_project({str(project)!r}); "
        "from fedsca_pipeline.pipeline_registry import register_pipelines; register_pipelines(); "
        "print(json.dumps(sorted(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)

    assert set(HEAVY) & set(json.loads(done.stdout)) == set()


def test_no_pickle_is_read_anywhere(project: Path) -> None:
    sources = {path: path.read_text() for path in (project / "src" / "fedsca_pipeline").rglob("*.py")}

    assert sources
    for word in ("import pickle", "torch.load(", "torch.save(", "allow_pickle=True", "joblib"):
        assert [path.name for path, text in sources.items() if word in text] == []


def test_no_site_is_called_a_client(project: Path) -> None:
    root = project / "src" / "fedsca_pipeline"

    named = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "client" in path.read_text().lower()}

    # MLflow's, npm's and Flower's own word.
    assert {path for path in named if not path.startswith("flower/")} <= {
        "tracking/run.py",
        "tracking/forget.py",
        "tracking/writer.py",
        "tracking/comparison.py",
        "model/foundation/minisam.py",
    }


def test_test_folders_mirror_the_package(project: Path) -> None:
    package, tests = project / "src" / "fedsca_pipeline", project / "tests"
    folders = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    elsewhere = {Path(), Path("end_to_end")}

    assert [folder.as_posix() for folder in sorted(folders - elsewhere) if not (package / folder).is_dir()] == []
    assert [path.name for path in tests.glob("test_*.py") if not _mirrors(path, package)] == []


def _mirrors(test: Path, package: Path) -> bool:
    about_the_project = {"architecture", "benchmarks", "docs", "docstrings", "lock_files"}
    return test.stem.removeprefix("test_") in about_the_project or (package / test.name.removeprefix("test_")).is_file()
