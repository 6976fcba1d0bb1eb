"""Site folders are found by name alone, and their fingerprint follows their content."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsca_pipeline.data.site_folder.discovery import DEMO_SITES, discover_sites, fingerprint_site, leads_out
from fedsca_pipeline.errors import DataError


def make_site(raw: Path, site: str) -> Path:
    for kind in ("images", "masks"):
        (raw / site / kind).mkdir(parents=True)
        (raw / site / kind / "a.png").write_bytes(kind.encode())
    return raw / site


def test_a_missing_or_empty_raw_folder_has_no_sites(tmp_path: Path) -> None:
    assert discover_sites(tmp_path / "nowhere") == ()
    assert discover_sites(tmp_path) == ()


def test_sites_are_folders_with_images_or_masks_in_name_order(tmp_path: Path) -> None:
    make_site(tmp_path, "zebra")
    (tmp_path / "alpha" / "masks").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "images").write_text("a file")
    for passed_over in (".hidden", "_parked"):
        (tmp_path / passed_over / "images").mkdir(parents=True)

    assert discover_sites(tmp_path) == ("alpha", "zebra")


def test_a_linked_site_folder_is_a_site(tmp_path: Path) -> None:
    make_site(tmp_path / "elsewhere", "store")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "north").symlink_to(tmp_path / "elsewhere" / "store")

    assert discover_sites(raw) == ("north",)


@pytest.mark.parametrize("name", ["St. Mary", "a.b", "-x", "köln"])
def test_a_folder_name_that_cannot_be_a_site_is_refused_with_a_cure(tmp_path: Path, name: str) -> None:
    make_site(tmp_path, name)

    with pytest.raises(DataError, match="rename the folder") as refusal:
        discover_sites(tmp_path)

    assert name in str(refusal.value)


def test_the_demonstration_sites_have_valid_sorted_names(tmp_path: Path) -> None:
    for site in DEMO_SITES:
        make_site(tmp_path, site)

    assert discover_sites(tmp_path) == DEMO_SITES


def test_the_fingerprint_is_of_content_and_names_only(tmp_path: Path) -> None:
    here, there = make_site(tmp_path / "one", "north"), make_site(tmp_path / "two", "south")
    (there / ".DS_Store").write_bytes(b"noise")

    first = fingerprint_site(here.parent, "north")

    assert re.fullmatch("[0-9a-f]{16}", first)
    assert fingerprint_site(there.parent, "south") == first


@pytest.mark.parametrize("change", ["content", "rename", "add", "remove", "swap"])
def test_any_change_changes_the_fingerprint(tmp_path: Path, change: str) -> None:
    site = make_site(tmp_path, "north")
    before = fingerprint_site(tmp_path, "north")
    image, mask = site / "images" / "a.png", site / "masks" / "a.png"

    if change == "content":
        image.write_bytes(b"other")
    elif change == "rename":
        image.rename(image.with_name("b.png"))
    elif change == "add":
        (site / "site.yml").write_text("notes: new")
    elif change == "remove":
        mask.unlink()
    else:
        one, two = image.read_bytes(), mask.read_bytes()
        image.write_bytes(two)
        mask.write_bytes(one)

    assert fingerprint_site(tmp_path, "north") != before


def test_a_dangling_link_does_not_stop_the_fingerprint(tmp_path: Path) -> None:
    site = make_site(tmp_path, "north")
    before = fingerprint_site(tmp_path, "north")
    (site / "images" / "b.png").symlink_to(tmp_path / "gone.png")

    assert fingerprint_site(tmp_path, "north") != before


def test_discovery_imports_the_standard_library_only() -> None:
    code = (
        "import sys; import fedsca_pipeline.data.site_folder.discovery; "
        "heavy = {'numpy', 'pandas', 'PIL', 'pydantic', 'yaml', 'torch', 'skimage'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )

    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert finished.returncode == 0, finished.stderr


@pytest.mark.timeout(60)
def test_a_fingerprint_reads_neither_pipes_nor_what_lies_elsewhere(tmp_path: Path) -> None:
    site = make_site(tmp_path / "raw", "north")
    secret = tmp_path / "secret"
    secret.write_bytes(b"one")
    (site / "images" / "link.png").symlink_to(secret)
    (site / "images" / "loop.png").symlink_to("loop.png")
    os.mkfifo(site / "images" / "pipe.png")
    before = fingerprint_site(tmp_path / "raw", "north")

    secret.write_bytes(b"two")

    assert fingerprint_site(tmp_path / "raw", "north") == before


def test_digests_that_are_known_already_are_not_computed_again(tmp_path: Path) -> None:
    site = make_site(tmp_path, "north")
    digests = {
        path.relative_to(site).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in site.rglob("*.png")
    }
    expected = fingerprint_site(tmp_path, "north")

    assert fingerprint_site(tmp_path, "north", digests) == expected
    assert fingerprint_site(tmp_path, "north", {**digests, "images/a.png": "0" * 64}) != expected


def test_links_into_the_project_s_own_dvc_cache_are_followed_and_no_others(tmp_path: Path) -> None:
    site, cached = tmp_path / "data" / "01_raw" / "north", tmp_path / ".dvc" / "cache" / "files" / "md5" / "ab" / "cd"
    for path in (cached, tmp_path / ".dvc" / "config.local", tmp_path / "other" / ".dvc" / "cache" / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")
    (site / "images").mkdir(parents=True)
    (site / "images" / "plain.png").write_text("content")
    plain = fingerprint_site(site.parent, "north")
    (site / "images" / "plain.png").unlink()
    links = {
        "plain.png": cached,
        "key.png": tmp_path / ".dvc" / "config.local",
        "o.png": tmp_path / "other/.dvc/cache/x",
    }

    for name, target in links.items():
        (site / "images" / name).symlink_to(target)

    assert [name for name in links if leads_out(site / "images" / name, site)] == ["key.png", "o.png"]
    for name in ("key.png", "o.png"):
        (site / "images" / name).unlink()
    assert fingerprint_site(site.parent, "north") == plain


def test_a_dvc_folder_within_a_site_makes_no_cache_of_what_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "secret.png").touch()
    (tmp_path / "north" / ".dvc").mkdir(parents=True)
    (tmp_path / "north" / ".dvc" / "cache").symlink_to(tmp_path / "store")
    (tmp_path / "north" / "a.png").symlink_to(tmp_path / "store" / "secret.png")

    assert leads_out(tmp_path / "north" / "a.png", tmp_path / "north")
