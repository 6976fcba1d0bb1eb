"""``python -m fedsca_pipeline``: the same as ``kedro run`` in this project."""

from __future__ import annotations

from pathlib import Path

from kedro.framework.startup import bootstrap_project
from kedro.utils import find_kedro_project


def main() -> None:
    """Run the project's pipelines with the command line's arguments."""
    bootstrap_project(find_kedro_project(Path.cwd()) or Path.cwd())
    from fedsca_pipeline.cli import run

    run()


if __name__ == "__main__":
    main()
