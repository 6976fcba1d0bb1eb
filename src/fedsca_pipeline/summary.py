"""What a run leaves on the terminal: the final table, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_result(table: Mapping[str, Mapping[str, Any]], mlflow: Mapping[str, str]) -> None:
    """Print the final table (``{site: {column: value}}``), the MLflow run and the next commands."""
    import pandas as pd
    from rich.console import Console

    from fedsca_pipeline.evaluation.tables import render_final_table

    console = Console()
    rows = pd.DataFrame.from_dict(table, orient="index").rename_axis("site").reset_index()
    console.print(render_final_table(rows.astype({"best round": "Int64"})))
    if mlflow["run_id"]:
        console.print(f"MLflow run: {mlflow['run_id']}", highlight=False)
    console.print("Next: kedro viz", highlight=False)
    console.print(f"      mlflow ui --backend-store-uri {mlflow['uri']}", highlight=False, soft_wrap=True)
