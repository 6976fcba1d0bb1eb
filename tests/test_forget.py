"""All that is kept of a site is deleted, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fedsca_pipeline.forget import forget, kept_sites

SITES = ("north", "south")
RUN = "07_model_output/checkpoints/0123456789abcdef"


def write(path: Path, content: object = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def root(project: Path, tmp_path: Path) -> Path:
    """A data root with every data set of the catalogue that has a site in its name, and the outputs of two runs."""
    catalog = yaml.safe_load((project / "conf" / "base" / "catalog.yml").read_text())
    root = tmp_path / "data"
    for site in SITES:
        for entry in catalog.values():
            if "{site}" in str(entry):
                write(Path(entry["filepath"].replace("{site}", site).replace("${_root}", str(root))))
        write(root / "06_models" / site / "last_round" / "site_model.json")
        write(root / "07_model_output" / "predictions" / site / "v1.nii.gz")
        write(root / "05_model_input" / f".{site}.safetensors.ab.partial" / "x")
        write(root / RUN / "sites" / site / "state_00001.safetensors")
        for kind in ("01_raw", "private"):
            write(root / kind / site / "images" / "a.png")
    write(root / RUN / "server" / "round_00001.safetensors")
    write(root / RUN / "begun.json", '"0123"')
    write(root / "07_model_output/rounds/0123456789abcdef/round_00001.json", {"sites": dict.fromkeys(SITES, 1)})
    write(root / "07_model_output/checkpoints/current.json", {"description": {"data": dict.fromkeys(SITES, "h")}})
    write(root / "06_models/run_description.json", {"data": dict.fromkeys(SITES, "h")})
    write(root / "06_models/site_models.json", {"sites": {site: {} for site in SITES}})
    write(root / "06_models/_general_model/site_model.json", {"site": "_general_model"})
    for name in ("final_table.csv", "final_table.json", "image_scores.csv", "site_scores.csv", "last_run.json"):
        write(root / "08_reporting" / name)
    write(root / "08_reporting/data_report/index.json", {"sites": {site: {} for site in SITES}})
    write(root / "08_reporting/data_report/sites.csv")
    write(root / "02_intermediate/import.json", {"imports": [{"sites": {site: {"images": 3} for site in SITES}}]})
    write(root / "02_intermediate/foundation.json", {"sha256": "0"})
    return root


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_no_file_of_the_site_or_with_its_numbers_stays_but_raw_data(root: Path, tmp_path: Path) -> None:
    deleted = forget(root, "north", tmp_path, raw=False)

    left = files(root)
    assert {path for path in left if "north" in path} == {"01_raw/north/images/a.png", "private/north/images/a.png"}
    assert not [path for path in sorted(left) if "north" in (root / path).read_text()]
    assert root / "05_model_input" / "north.safetensors" in deleted
    assert root / "02_intermediate" / "import.json" in deleted
    assert all(path.name == "import.json" or not path.exists() for path in deleted)


def test_what_is_of_other_sites_alone_stays(root: Path, tmp_path: Path) -> None:
    before = files(root)

    forget(root, "north", tmp_path, raw=False)

    own = {path for path in before if "south" in path and RUN not in path}
    assert own
    assert own | {"02_intermediate/foundation.json", "06_models/_general_model/site_model.json"} <= files(root)
    assert json.loads((root / "02_intermediate/import.json").read_text()) == {
        "imports": [{"sites": {"south": {"images": 3}}}]
    }


def test_raw_data_and_what_belongs_to_them_go_if_that_is_asked_for(root: Path, tmp_path: Path) -> None:
    forget(root, "north", tmp_path, raw=True)

    assert not [path for path in files(root) if "north" in path]
    assert "01_raw/south/images/a.png" in files(root)


def test_a_link_is_deleted_and_what_it_leads_to_stays(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "share" / "a.png")
    (root / "03_primary" / "linked").symlink_to(tmp_path / "share")
    (root / "01_raw" / "linked").symlink_to(tmp_path / "share")

    forget(root, "linked", tmp_path, raw=True)

    assert not (root / "03_primary" / "linked").is_symlink()
    assert not (root / "01_raw" / "linked").is_symlink()
    assert (tmp_path / "share" / "a.png").is_file()


def test_runs_and_tables_without_the_site_stay(root: Path, tmp_path: Path) -> None:
    write(root / "07_model_output/checkpoints/ffff/sites/south/state_00001.safetensors")
    write(root / "07_model_output/rounds/ffff/round_00001.json", {"sites": {"south": 1}})
    write(root / "06_models/run_description.json", {"data": {"south": "h"}})

    forget(root, "north", tmp_path, raw=False)

    assert {
        "07_model_output/checkpoints/ffff/sites/south/state_00001.safetensors",
        "07_model_output/rounds/ffff/round_00001.json",
        "06_models/run_description.json",
        "08_reporting/final_table.csv",
    } <= files(root)


def test_runs_on_pooled_images_and_unfinished_cells_go(root: Path, tmp_path: Path) -> None:
    write(root / "07_model_output/checkpoints/ffff/sites/_pooled/state_00001.safetensors")
    write(root / "07_model_output/comparison_checkpoints/aaaa/c0de/sites/north/x")
    write(root / "07_model_output/comparison_checkpoints/bbbb/c0de/sites/south/x")

    forget(root, "north", tmp_path, raw=False)

    assert not (root / "07_model_output/checkpoints/ffff").exists()
    assert not (root / "07_model_output/comparison_checkpoints/aaaa").exists()
    assert (root / "07_model_output/comparison_checkpoints/bbbb").exists()


def test_cells_that_the_site_took_part_in_go_with_their_page(root: Path, tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    write(cells / "a.json", {"description": {"data": dict.fromkeys(SITES, "h")}})
    write(cells / "b.json", {"description": {"data": {"south": "h"}}})
    write(root / "08_reporting/comparison/table.csv")

    forget(root, "north", cells, raw=False)

    assert [path.name for path in cells.iterdir()] == ["b.json"]
    assert not (root / "08_reporting/comparison").exists()


def test_the_sites_of_which_anything_is_kept_are_known_also_those_of_hospitals(root: Path, tmp_path: Path) -> None:
    assert kept_sites(root) == set(SITES)
    write(root / "02_intermediate/joined_sites.json", {"hospital_a": {}})
    write(root / "06_models/run_description.json", "damaged")
    assert kept_sites(root) == {*SITES, "hospital_a"}

    forget(root, "hospital_a", tmp_path, raw=False)
    forget(root, "north", tmp_path, raw=True)

    assert kept_sites(root) == {"south"}
    assert kept_sites(tmp_path / "none") == set()


def test_a_killed_deletion_can_be_repeated(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlink = Path.unlink

    def stop_at(path: Path, missing_ok: bool = False) -> None:
        if path.name == "run_description.json":
            raise OSError(5, "Input/output error", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stop_at)
        with pytest.raises(OSError, match="Input/output"):
            forget(root, "north", tmp_path, raw=False)

    assert "north" in kept_sites(root)
    forget(root, "north", tmp_path, raw=False)
    assert kept_sites(root) == {"south"}


@pytest.mark.parametrize("name", ["sites", "data", "round", "images"])
def test_a_site_may_be_called_like_a_key_of_a_document(root: Path, tmp_path: Path, name: str) -> None:
    write(root / "03_primary" / name / "manifest.csv")
    record = {"round": 1, "data": [{"north": 1}], "sites": {"north": {"loss": 1, "images": 3}}}
    write(root / "07_model_output/rounds/0123456789abcdef/round_00001.json", record)
    before = files(root)

    deleted = forget(root, name, tmp_path, raw=False)

    assert deleted == [root / "03_primary" / name]
    assert files(root) == before - {f"03_primary/{name}/manifest.csv"}
    imported = json.loads((root / "02_intermediate/import.json").read_text())
    assert imported["imports"][0]["sites"]["north"] == {"images": 3}
