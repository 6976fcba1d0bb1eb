"""Every file is in a pair or in the list of broken ones, with a reason and a cure."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.site_folder.pairing import Broken, by_fault, list_faults, pair_files
from fedsca_pipeline.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind in ("images", "masks"):
        (tmp_path / "north" / kind).mkdir(parents=True)
        for stem in ("b", "a"):
            (tmp_path / "north" / kind / f"{stem}.png").touch()
    return tmp_path / "north"


def reasons(folder: Path) -> dict[str, str]:
    return {entry.file: f"{entry.reason}; {entry.cure}" for entry in pair_files(folder)[1]}


def test_pairs_come_by_stem_whatever_the_suffixes(folder: Path) -> None:
    (folder / "masks" / "a.png").rename(folder / "masks" / "a.TIF")
    (folder / "images" / ".DS_Store").touch()

    pairs, broken = pair_files(folder)

    assert [(pair.stem, pair.image, pair.mask) for pair in pairs] == [
        ("a", "images/a.png", "masks/a.TIF"),
        ("b", "images/b.png", "masks/b.png"),
    ]
    assert broken == []


@pytest.mark.parametrize(("kind", "reason"), [("masks", "image without a mask"), ("images", "mask without an image")])
def test_a_file_without_its_other_half_is_broken(folder: Path, kind: str, reason: str) -> None:
    (folder / kind / "a.png").unlink()
    other = "images" if kind == "masks" else "masks"

    assert reason in reasons(folder)[f"{other}/a.png"]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_two_files_of_one_stem_are_both_broken(folder: Path, kind: str) -> None:
    (folder / kind / "a.tif").touch()

    assert set(reasons(folder)) == {f"{kind}/a.png", f"{kind}/a.tif"}
    assert [pair.stem for pair in pair_files(folder)[0]] == ["b"]


def test_formats_without_a_reader_and_inner_folders_are_not_passed_over(folder: Path) -> None:
    (folder / "images" / "c.xyz").touch()
    (folder / "masks" / "more").mkdir()

    broken = reasons(folder)

    assert "convert it to one of .png" in broken["images/c.xyz"]
    assert "move its files up" in broken["masks/more"]


def test_links_out_of_the_site_are_broken_and_links_within_are_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").touch()
    (folder / "images" / "b.png").unlink()
    (folder / "images" / "b.png").symlink_to(tmp_path / "secret.png")
    (folder / "images" / "a.png").rename(folder / "a.png")
    (folder / "images" / "a.png").symlink_to(folder / "a.png")

    assert "leads out of the site folder" in reasons(folder)["images/b.png"]
    assert [pair.stem for pair in pair_files(folder)[0]] == ["a"]


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_missing_or_empty_folder_names_it_and_the_cure(folder: Path, kind: str) -> None:
    for file in (folder / kind).iterdir():
        file.unlink()
    with pytest.raises(DataError, match=f"{kind}: no files; put"):
        pair_files(folder)

    (folder / kind).rmdir()
    with pytest.raises(DataError, match=f"no {kind} folder; put"):
        pair_files(folder)


@pytest.mark.timeout(60)
def test_links_to_nowhere_and_pipes_are_broken_and_not_opened(folder: Path) -> None:
    (folder / "images" / "b.png").unlink()
    (folder / "images" / "b.png").symlink_to("b.png")
    os.mkfifo(folder / "images" / "c.png")

    broken = reasons(folder)

    assert "leads nowhere" in broken["images/b.png"]
    assert "a pipe" in broken["images/c.png"]


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("two\nlines", r"two\nlines"),
        ("\x1b[31mred", r"\x1b[31mred"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("\u202ex", r"\u202ex"),
    ],
)
def test_unprintable_names_are_refused_and_shown_escaped(folder: Path, name: str, escaped: str) -> None:
    (folder / "images" / f"{name}.png").touch()
    (folder / "masks" / f"{name}.png").touch()

    broken = reasons(folder)

    assert "unprintable" in broken[f"images/{escaped}.png"]
    assert "unprintable" in broken[f"masks/{escaped}.png"]
    assert [pair.stem for pair in pair_files(folder)[0]] == ["a", "b"]


def test_names_in_any_alphabet_are_fine(folder: Path) -> None:
    for kind in ("images", "masks"):
        (folder / kind / "Größe 日本 (2).png").touch()

    assert "Größe 日本 (2)" in [pair.stem for pair in pair_files(folder)[0]]


def test_what_a_reader_quotes_of_a_file_is_escaped() -> None:
    broken = Broken.of("images/a.nrrd", BrokenSampleError("encoding \x1b[2J\x7f", "copy\nagain"))

    assert (broken.reason, broken.cure) == (r"encoding \x1b[2J\x7f", r"copy\nagain")


def test_faults_that_differ_in_names_and_numbers_are_one_and_others_are_not() -> None:
    broken = [
        Broken("images/b.png", "the same picture as images/a1f.png, of another subject", "delete one"),
        Broken("images/c.png", "the same picture as images/bee.png, of another subject", "delete one"),
        Broken("images/d.png", "image without a mask", "add masks/d.png"),
        *(Broken(f"images/e{number}.png", "image without a mask", f"add masks/e{number}.png") for number in range(3)),
        Broken("images/f.png", "image without a mask", "take it away"),
    ]

    assert [(fault.file, fault.cure) for fault in by_fault(broken, "north/")] == [
        (
            "4 files alike (north/images/d.png, north/images/e0.png, north/images/e1.png, ...)",
            "add masks/d.png",
        ),
        ("2 files alike (north/images/b.png, north/images/c.png)", "delete one"),
        ("north/images/f.png", "take it away"),
    ]
    assert by_fault([]) == []


def test_faults_alike_to_the_letter_are_not_called_alike_but_the_same() -> None:
    (fault,) = by_fault([Broken(f"images/{stem}.png", "empty", "export again") for stem in "ab"])

    assert fault.file == "2 files (images/a.png, images/b.png)"


def test_a_list_of_faults_ends_and_says_where_the_rest_is_only_where_there_is_a_rest() -> None:
    kinds = [Broken(f"images/{letter}.png", letter * 2, "export again") for letter in "abcdefghijklmnopqrstuvw"]

    *_, last, cut, where = list_faults(kinds, "", "in the report").splitlines()

    assert (last, cut) == ("  images/t.png: tt; export again", "  ... and 3 more faults")
    assert where == "  (each file: in the report)"
    assert list_faults(kinds[:2], "", "in the report").count("\n") == 2


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
@pytest.mark.parametrize("stem", ["Müller_1", "ångström", "café"])
def test_accents_that_are_stored_apart_pair_with_those_that_are_not(
    folder: Path, stem: str, forms: tuple[str, str]
) -> None:
    image, mask = (f"{unicodedata.normalize(form, stem)}.png" for form in forms)
    (folder / "images" / image).touch()
    (folder / "masks" / mask).touch()

    pairs, broken = pair_files(folder)

    assert broken == []
    found = {pair.stem: (pair.image, pair.mask) for pair in pairs}
    assert found[unicodedata.normalize("NFC", stem)] == (f"images/{image}", f"masks/{mask}")


def test_two_images_whose_names_differ_in_form_only_share_a_stem(folder: Path) -> None:
    for form in ("NFC", "NFD"):
        (folder / "images" / f"{unicodedata.normalize(form, 'é')}.png").touch()
    (folder / "masks" / "é.png").touch()

    assert all("2 files share the stem" in reason for reason in reasons(folder).values())


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini"])
def test_what_a_file_browser_leaves_is_told_as_such(folder: Path, name: str) -> None:
    (folder / "images" / name).touch()

    assert reasons(folder)[f"images/{name}"] == (
        "a table of contents, or what a file browser leaves, not an image; delete it"
    )
