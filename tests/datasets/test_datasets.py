from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kedro.io import DatasetError

from fedsca_pipeline.data.preprocessing.array_writer import ArraysWriter
from fedsca_pipeline.datasets.catalog import ProjectCatalog
from fedsca_pipeline.datasets.documents import AtomicJSONDataset, GrowingJSONDataset
from fedsca_pipeline.datasets.figures import AtomicMatplotlibDataset, AtomicPlotlyDataset
from fedsca_pipeline.datasets.folders import FolderDataset, SiteArraysDataset
from fedsca_pipeline.datasets.partitions import WholePartitionsDataset
from fedsca_pipeline.datasets.tables import AtomicCSVDataset, PreviousCSVDataset


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_save_leaves_the_earlier_file_and_no_other(tmp_path: Path) -> None:
    dataset = AtomicJSONDataset(filepath=str(tmp_path / "a.json"))
    dataset.save({"value": 1})

    with pytest.raises(DatasetError):
        dataset.save({"value": object()})

    assert dataset.load() == {"value": 1}
    assert files_in(tmp_path) == ["a.json"]


def test_each_kind_saves_and_has_a_preview(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from plotly import graph_objects as go

    table = AtomicCSVDataset(filepath=str(tmp_path / "t.csv"), save_args={"index": False})
    plot = AtomicPlotlyDataset(filepath=str(tmp_path / "p.json"))
    picture = AtomicMatplotlibDataset(filepath=str(tmp_path / "f.png"))

    table.save(pd.DataFrame({"a": [1, 2]}))
    plot.save(go.Figure())
    picture.save(Figure())

    assert files_in(tmp_path) == ["f.png", "p.json", "t.csv"]
    assert table.preview(nrows=1)["data"] == [[1]]
    assert set(plot.preview()) >= {"data", "layout"}
    assert picture.preview()


def test_a_missing_previous_table_loads_as_none(tmp_path: Path) -> None:
    dataset = PreviousCSVDataset(filepath=str(tmp_path / "t.csv"))

    assert dataset.load() is None

    AtomicCSVDataset(filepath=str(tmp_path / "t.csv"), save_args={"index": False}).save(pd.DataFrame({"a": [1]}))
    assert dataset.load()["a"].tolist() == [1]


def test_a_folder_loads_as_its_path_and_cannot_be_saved(tmp_path: Path) -> None:
    dataset = FolderDataset(str(tmp_path / "deep" / "folder"))

    assert dataset.load() == tmp_path / "deep" / "folder"
    assert dataset.load().is_dir()
    with pytest.raises(DatasetError, match="nodes write into it themselves"):
        dataset.save({})


def test_arrays_load_as_the_path_of_their_file(tmp_path: Path) -> None:
    dataset = SiteArraysDataset(str(tmp_path / "site.safetensors"))
    with pytest.raises(DatasetError, match="--pipeline=preprocessing"):
        dataset.load()

    with ArraysWriter(tmp_path, "site", 16) as writer:
        writer.append(np.zeros((3, 16, 16), np.uint8), np.zeros((16, 16), np.uint8))
        dataset.save(writer.finish([0], pd.DataFrame({"row": [0], "image": ["a.png"], "split": ["train"]})))

    assert dataset.load() == tmp_path / "site.safetensors"
    assert files_in(tmp_path) == ["site.safetensors"]


def test_a_partial_file_is_no_partition_and_the_next_save_removes_it(tmp_path: Path) -> None:
    left = {name: tmp_path / "run" / f".{name}.json.ab12cd34.partial" for name in ("two", "twofold")}
    for name, folder in left.items():
        folder.mkdir(parents=True)
        (folder / f"{name}.json").touch()
    dataset = WholePartitionsDataset(path=str(tmp_path), dataset=AtomicJSONDataset, filename_suffix=".json")
    assert not dataset.exists()

    dataset.save({"run/one": [1]})
    assert {name: load() for name, load in dataset.load().items()} == {"run/one": [1]}

    dataset.save({"run/two": [2]})
    assert {name: load() for name, load in dataset.load().items()} == {"run/one": [1], "run/two": [2]}
    assert files_in(tmp_path / "run") == [".twofold.json.ab12cd34.partial", "one.json", "two.json"]


def test_the_catalog_gives_each_reader_of_a_parameter_its_own_copy() -> None:
    catalog = ProjectCatalog()
    given = {"sites": ["a"]}

    catalog["params:group"] = given
    catalog.load("params:group")["sites"].append("b")
    given["sites"].append("c")

    assert catalog.load("params:group") == {"sites": ["a"]}


def test_the_catalog_leaves_everything_else_to_kedro(tmp_path: Path) -> None:
    catalog = ProjectCatalog()
    table, folder = pd.DataFrame({"a": [1]}), FolderDataset(str(tmp_path))

    catalog["table"], catalog["folder"] = table, folder

    assert catalog.load("table").equals(table)
    assert catalog.get("folder") is folder


FORMULAS = ['=HYPERLINK("x")', "+1", "-2+3", "@SUM(A1)", "\tx", "'=1", "''-x", "'plain", "plain", "007", "", "0"]


@pytest.mark.parametrize("dataset", [AtomicCSVDataset, PreviousCSVDataset])
def test_a_spreadsheet_runs_no_cell_of_a_table_and_the_project_reads_what_was_saved(
    tmp_path: Path, dataset: type
) -> None:
    table = pd.DataFrame(
        {"image": FORMULAS, "=a": range(len(FORMULAS)), "score": [-0.5] * len(FORMULAS), "note": [None, *FORMULAS[1:]]}
    )
    path = tmp_path / "t.csv"
    text = {"dtype": {"image": str, "note": str}, "keep_default_na": False}
    AtomicCSVDataset(filepath=str(path), save_args={"index": False}).save(table)

    with path.open(newline="") as stream:
        head, *rows = csv.reader(stream)
    assert not [cell for row in rows for cell in (row[0], row[3]) if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert head == ["image", "'=a", "score", "note"]
    assert rows[0][0] == '\'=HYPERLINK("x")'
    assert [row[0] for row in rows[7:]] == FORMULAS[7:]
    assert {row[2] for row in rows} == {"-0.5"}
    back = dataset(filepath=str(path), load_args=text).load()
    pd.testing.assert_frame_equal(back, table.fillna({"note": ""}), check_dtype=False)


def test_ordinary_tables_are_saved_byte_for_byte_as_pandas_does(tmp_path: Path) -> None:
    table = pd.DataFrame({"site": ["north", "south"], "dice": [0.25, None], "count": pd.array([1, None], "Int64")})
    for columns in (["site", "dice", "count"], ["dice"]):
        AtomicCSVDataset(filepath=str(tmp_path / "t.csv"), save_args={"index": False}).save(table[columns])
        assert (tmp_path / "t.csv").read_text() == table[columns].to_csv(index=False)


def test_a_growing_document_keeps_the_keys_of_earlier_saves(tmp_path: Path) -> None:
    dataset = GrowingJSONDataset(filepath=str(tmp_path / "import.json"))

    for found in ({"north": {"images": 1}}, {"south": {"images": 2}}, {}, {"north": {"images": 3}}):
        dataset.save(found)

    assert dataset.load() == {"north": {"images": 3}, "south": {"images": 2}}
    assert files_in(tmp_path) == ["import.json"]
