"""``site.yml`` says what it may say, and a mistake in it is named."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsca_pipeline.data.readers.common import BrokenSampleError
from fedsca_pipeline.data.site_folder.site_file import SiteFile, read_site_file
from fedsca_pipeline.errors import DataError


def test_without_a_file_each_image_is_its_own_subject(tmp_path: Path) -> None:
    assert read_site_file(tmp_path) == SiteFile()
    assert SiteFile().subject("scan_7") == "scan_7"


def test_an_empty_file_is_the_same_as_none(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_text("# nothing to say\n")

    assert read_site_file(tmp_path) == SiteFile()


def test_all_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_text(
        'label_map: {255: 1, 128: 2}\ngroup: "^(p[0-9]+)_"\nspacing: [0.5, 0.7]\nnotes: 3 T\n'
    )

    site_file = read_site_file(tmp_path)

    assert site_file.label_map == {255: 1, 128: 2}
    assert site_file.spacing == (0.5, 0.7)
    assert site_file.notes == "3 T"
    assert site_file.subject("p12_3") == "p12"


def test_colours_stand_beside_numbers_in_either_case(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_text("label_map: {85: 1, '#FF8000': 2, '#ff8000': 2, -1: 0}\n")

    rule = read_site_file(tmp_path).label_rule

    assert rule.numbers == {85: 1, -1: 0}
    assert rule.colours == {"#ff8000": 2}
    assert rule.threshold is None


def test_a_colour_without_quotes_is_a_comment_and_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_text("label_map:\n  #ff0000: 1\n")

    with pytest.raises(DataError, match="a colour has to be quoted"):
        read_site_file(tmp_path)


def test_stems_and_subjects_of_digits_stay_text(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_text("subjects: {0012: 007, 1e3: 8}\n")

    assert read_site_file(tmp_path).subjects == {"0012": "007", "1e3": "8"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("labels: {1: 1}", "labels"),
        ("label_map: {a: 1}", "label_map"),
        ("label_map: {1: 300}", "label_map"),
        ("label_map: {'#f00': 1}", "#rrggbb"),
        ("label_map: {#ff0000: 1}", "a colour needs quotes"),
        ("label_map: {'#ff0000': 1, '#FF0000': 2}", "two classes, 1 and 2"),
        ("mask_threshold: 0", "mask_threshold"),
        ("mask_threshold: inf", "mask_threshold"),
        ("mask_threshold: 128\nlabel_map: {1: 1}", "not both"),
        ("group: 'p[0-9]+'", "group"),
        ("group: '(a)(b)'", "group"),
        ("group: '('", "group"),
        ("spacing: [1]", "spacing"),
        ("spacing: [0, 1]", "spacing"),
        ("group: '(a)'\nsubjects: {a: b}", "not both"),
        ("group: [", "YAML"),
        ("- a list", "site.yml"),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "site.yml").write_text(text)

    with pytest.raises(DataError, match=named) as mistake:
        read_site_file(tmp_path)

    assert str(tmp_path / "site.yml") in str(mistake.value)


def test_bytes_that_are_not_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_bytes(b"notes: \xff\xfe")

    with pytest.raises(DataError, match=r"site\.yml"):
        read_site_file(tmp_path)


def test_the_other_spelling_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("notes: x")

    with pytest.raises(DataError, match=r"called site\.yml"):
        read_site_file(tmp_path)


@pytest.mark.parametrize("rule", [SiteFile(group="^(p[0-9]+)_"), SiteFile(subjects={"a": "p1"})])
def test_a_stem_that_no_rule_covers_is_broken_rather_than_guessed(rule: SiteFile) -> None:
    with pytest.raises(BrokenSampleError, match=r"site\.yml"):
        rule.subject("unknown")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "not a file of this site"),
        (lambda path: path.symlink_to("site.yml"), "not a file of this site"),
        (os.mkfifo, "not a file of this site"),
        (lambda path: path.mkdir(), "not a file of this site"),
        (lambda path: path.write_text("[" * 5000), "not readable YAML"),
        (lambda path: path.write_bytes(b"#" * (2**24 + 1)), "larger than"),
    ],
    ids=["link", "loop", "pipe", "folder", "depth", "size"],
)
def test_what_cannot_be_a_site_file_is_not_read(tmp_path: Path, make: Callable[[Path], object], named: str) -> None:
    make(tmp_path / "site.yml")

    with pytest.raises(DataError, match=rf"site\.yml: {named}"):
        read_site_file(tmp_path)


NFC, NFD = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("written", [NFC, NFD])
def test_subjects_and_group_name_a_stem_in_either_form(tmp_path: Path, written: str) -> None:
    (tmp_path / "site.yml").write_text(f"subjects: {{{written}_1: {written}}}\n", "utf-8")
    assert read_site_file(tmp_path).subject(f"{NFC}_1") == NFC

    (tmp_path / "site.yml").write_text(f"group: '^({written}|Ana)_'\n", "utf-8")
    assert read_site_file(tmp_path).subject(f"{NFC}_1") == NFC


def test_a_stem_in_two_forms_has_one_subject(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_text(f"subjects: {{{NFC}: a, {NFD}: b}}\n", "utf-8")

    with pytest.raises(DataError, match="has two subjects, a and b"):
        read_site_file(tmp_path)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("notes: a\ngroup: '(a)'\nnotes: b\n", "notes", 3),
        ("label_map: {1: 1, 2: 2,\n 1: 2}\n", "1", 2),
        ("subjects:\n  Miller: a\n  Miller: a\n", "Miller", 3),
    ],
)
def test_a_key_twice_is_refused(tmp_path: Path, text: str, key: str, line: int) -> None:
    (tmp_path / "site.yml").write_text(text)

    with pytest.raises(DataError, match=f"site.yml: the key '{key}' is there twice, the second time in line {line}"):
        read_site_file(tmp_path)
    with pytest.raises(DataError, match=f"a key is there twice, the second time in line {line}") as terse:
        read_site_file(tmp_path, terse=True)
    assert f"'{key}'" not in str(terse.value)


@pytest.mark.parametrize("subject", ["a\\rb", "a\\tb", "\\n"])
def test_a_subject_that_no_table_keeps_is_refused(tmp_path: Path, subject: str) -> None:
    (tmp_path / "site.yml").write_text(f'subjects: {{scan: "{subject}"}}\n')

    with pytest.raises(DataError, match="the subject of scan holds unprintable characters"):
        read_site_file(tmp_path)
