"""``python -m fedsca_pipeline``: ``kedro run`` without a project folder, as Kedro has it for packaged projects."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kedro.framework.project import configure_project


def main(*arguments: Any, **options: Any) -> Any:
    """Run the project's pipelines with the command line's arguments; ``--conf-source`` names the configuration.

    Arguments and options are click's: a list in the place of the command line, ``standalone_mode=False`` to return.
    """
    # In a project folder the file .telemetry says the same.
    os.environ.setdefault("KEDRO_DISABLE_TELEMETRY", "true")
    configure_project(Path(__file__).parent.name)
    from fedsca_pipeline.cli import run

    return run(*arguments, **options)


if __name__ == "__main__":
    main()
