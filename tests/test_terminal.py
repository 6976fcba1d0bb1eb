from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest
from rich.console import Console

from fedsca_pipeline.evaluation import MEAN
from fedsca_pipeline.terminal import (
    FinalTable,
    render_class_table,
    render_final_table,
    show_comparison,
    show_data_report,
    show_result,
)


def row(chosen: float | None, up: int = 500_000, best: int | None = 7) -> dict[str, float | int | None]:
    return {
        "Dice before": 0.3,
        "Dice after": 0.7,
        "Dice chosen": chosen,
        "HD95": 4.0,
        "bytes up": up,
        "bytes down": 600_000,
        "best round": best,
    }


TWO_SITES = {"a_site": row(0.75, up=1_500_000), "b_site": row(0.95), MEAN: row(0.85, up=1_000_000, best=None)}


def printed(table: FinalTable) -> str:
    console = Console(width=120, file=io.StringIO())
    console.print(render_final_table(table))
    return console.file.getvalue()


def test_the_final_table_shows_readable_sizes_and_separates_the_mean() -> None:
    lines = printed(TWO_SITES).splitlines()

    a_site = next(number for number, line in enumerate(lines) if "a_site" in line)
    mean = next(number for number, line in enumerate(lines) if MEAN in line)
    assert "0.750" in lines[a_site]
    assert "1.5 MB" in lines[a_site]
    assert "500.0 kB" in lines[a_site + 1]
    assert mean == a_site + 3
    assert not lines[mean - 1].strip()
    assert "–" in lines[mean]
    assert max(map(len, lines)) <= 80
    assert any("round" in line for line in lines)
    assert any("Lowest chosen Dice: a_site (0.750)" in line for line in lines)


def test_the_caption_shows_epsilon_by_level_and_site_if_any_was_spent() -> None:
    spent = {"a_site": ("patient-level", 2.4567), "b_site": ("image-level", 8.0), MEAN: (None, None)}
    private = {site: {**TWO_SITES[site], "privacy": level, "epsilon": e} for site, (level, e) in spent.items()}

    lines = [line.strip() for line in printed(private).splitlines()]

    assert "Epsilon spent, image-level: b_site 8.00." in lines
    assert "Epsilon spent, patient-level: a_site 2.46." in lines
    assert "Epsilon" not in printed(TWO_SITES)


def test_several_classes_have_their_own_table_over_the_sites_that_have_them() -> None:
    classes = {
        "Dice chosen tumour": (0.6, 0.8, 0.7),
        "Dice chosen cyst": (0.5, None, 0.5),
        "Dice chosen x": (None,) * 3,
    }
    table = {
        site: {**values, **{column: dice[index] for column, dice in classes.items()}}
        for index, (site, values) in enumerate(TWO_SITES.items())
    }
    console = Console(width=80, file=io.StringIO())

    console.print(render_class_table(table))

    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["tumour", "2", "of", "2", "0.700", "0.600", "a_site"] in lines
    assert ["cyst", "1", "of", "2", "0.500", "0.500", "a_site"] in lines
    assert ["x", "0", "of", "2", "–", "–"] in lines
    assert render_class_table(TWO_SITES) is None
    assert render_class_table({}) is None
    assert "tumour" not in printed(table)


def test_a_missing_value_is_a_dash_and_never_the_lowest_dice() -> None:
    shown = printed({"a_site": row(None), "b_site": row(0.9), MEAN: row(None)})

    assert "–" in shown
    assert "Lowest chosen Dice: b_site (0.900)" in shown
    assert "Lowest" not in printed({"a_site": row(None), "b_site": row(None), MEAN: row(None)})


def test_a_single_site_is_not_called_the_lowest_and_without_sites_only_headings_remain() -> None:
    assert "Lowest" not in printed({"a_site": row(0.9), MEAN: row(0.9)})
    assert "site" in printed({})


def test_a_compared_method_with_unknown_bytes_has_a_dash(capsys) -> None:
    methods = [
        {"label": name, "train_images": 8.0, "dice": 0.8, "worst_dice": 0.7, "hd95": 9.0, "bytes": sent}
        for name, sent in (("fedsca", 523_000.0), ("centralised", math.nan))
    ]

    show_comparison(methods, "results.md", {"run_id": "1", "uri": "sqlite:///x"})

    shown = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert shown["fedsca"].rstrip().endswith("523.0 kB")
    assert shown["centralised"].rstrip().endswith("–")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        (
            "sqlite:////home/my data/mlflow.db",
            [
                "Next: kedro viz",
                "      mlflow ui --backend-store-uri 'sqlite:////home/my data/mlflow.db'",
                "      then open http://127.0.0.1:5000/#/experiments/3/runs?workflowType=machine_learning",
            ],
        ),
        (
            "https://mlflow.hospital.example/",
            [
                "Next: kedro viz",
                "      open https://mlflow.hospital.example/#/experiments/3/runs?workflowType=machine_learning",
            ],
        ),
    ],
)
def test_the_way_to_the_run_is_that_of_its_tracking_address(capsys, uri: str, said: list[str]) -> None:
    show_result(TWO_SITES, {"run_id": "abc", "uri": uri, "experiment_id": "3"})

    assert capsys.readouterr().out.splitlines()[-len(said) - 1 :] == ["MLflow run: abc", *said]


def test_without_an_mlflow_run_nothing_leads_to_one_and_without_its_experiment_the_way_is_to_all(capsys) -> None:
    show_result(TWO_SITES, {"run_id": "", "uri": "sqlite:///x", "experiment_id": ""})
    assert "mlflow" not in capsys.readouterr().out.lower()

    show_result(TWO_SITES, {"run_id": "abc", "uri": "sqlite:///x"})
    assert "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning" in capsys.readouterr().out


def test_printing_the_result_does_not_import_pandas() -> None:
    code = f"import sys; from fedsca_pipeline.terminal import show_result; show_result({TWO_SITES!r}, "
    code += "{'run_id': '1', 'uri': 'sqlite:///x'}); sys.exit('pandas' in sys.modules)"

    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_data_report_s_table_fits_80_columns_and_shows_the_refusals(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    counts = {"used": 1234, "broken": 12, "subjects": 400, "train": 800, "validation": 134, "test": 300}
    site = {"counts": counts, "refusals": [], "alerts": ["look [here]"], "near_duplicates": 3, "warnings": 7}
    refused = {**site, "refusals": ["12 files [of many] cannot be used"]}

    show_data_report({"summit_ultrasound": site, "b_hospital": refused}, "data/index.html")

    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.split()[:3] == ["summit_ultrasound", "yes", "1234"] for line in lines)
    assert any(line.split()[:2] == ["b_hospital", "no"] for line in lines)
    assert "b_hospital: 12 files [of many] cannot be used" in lines
    assert "summit_ultrasound: look [here]" in lines
    assert "Data report: data/index.html" in lines
