"""Raw sites hold no DICOM file and no hidden name; the refusal names the import that lets them in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsca_pipeline.data.site_folder.identifiers import is_dicom, open_site
from fedsca_pipeline.errors import DataError

PREAMBLE = bytes(128) + b"DICM"
COMMAND = '--params="importer={},source=<new place>,import_options.site=clinic"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("images", "masks"):
        (tmp_path / "clinic" / kind).mkdir(parents=True)
        Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "clinic" / kind / "a.png")
    return tmp_path / "clinic"


def add_series(folder: Path) -> None:
    (folder / "images" / "MILLER").mkdir()
    (folder / "images" / "MILLER" / "1").write_bytes(PREAMBLE)


@pytest.mark.parametrize(
    "add",
    [
        lambda folder: (folder / "images" / "MILLER.dcm").write_bytes(b""),
        lambda folder: (folder / "masks" / "MILLER.DCM").write_bytes(b"x"),
        lambda folder: (folder / "images" / "DICOMDIR").write_bytes(b"x"),
        lambda folder: (folder / "images" / "MILLER").write_bytes(PREAMBLE),
        lambda folder: (folder / "images" / "MILLER.png").write_bytes(PREAMBLE),
        add_series,
    ],
    ids=["suffix", "mask in capitals", "DICOMDIR", "preamble", "preamble under another suffix", "series"],
)
def test_a_dicom_file_is_refused_with_the_import_command_and_without_its_name(
    folder: Path, add: Callable[[Path], Any]
) -> None:
    add(folder)

    with pytest.raises(DataError) as refused:
        open_site(folder)

    assert "1 DICOM file or series" in str(refused.value)
    assert COMMAND.format("dicom") in str(refused.value)
    assert "MILLER" not in str(refused.value)


def test_a_site_that_asks_for_hidden_names_is_refused_with_the_import_command(folder: Path) -> None:
    (folder / "site.yml").write_text("hide_names: true\n")

    with pytest.raises(DataError) as refused:
        open_site(folder)

    assert COMMAND.format("site_folder") in str(refused.value)


def test_a_site_without_identifiers_gives_its_site_file(folder: Path) -> None:
    assert open_site(folder).spacing is None
    (folder / "site.yml").write_text("spacing: [1, 2]\nhashed_names: true\n")
    assert open_site(folder).spacing == (1.0, 2.0)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such site folder"):
        open_site(tmp_path / "clinic")


def test_nothing_outside_the_site_and_no_pipe_is_opened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(PREAMBLE)
    (folder / "images" / "b.png").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "images" / "c.png")

    assert not is_dicom(folder / "images" / "b.png", folder)
    assert not is_dicom(folder / "images" / "c.png", folder)
    open_site(folder)
