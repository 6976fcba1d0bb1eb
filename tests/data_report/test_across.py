"""Sites are compared by their facts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsca_pipeline.config import DataReportConfig, PreprocessingConfig
from fedsca_pipeline.data_report.across import across_sites, overview
from fedsca_pipeline.data_report.inspection import inspect_site

OPTIONS = DataReportConfig(thumbnails=0, embedding=False)


def facts_of(raw: Path, *sites: str) -> list[dict[str, Any]]:
    config = PreprocessingConfig(image_size=64)
    return [inspect_site(raw, site, config, 0, None, OPTIONS).facts for site in sites]


def compare(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare facts after a round trip through JSON, as between separate sites."""
    found = across_sites(json.loads(json.dumps(facts)), OPTIONS.near_duplicate_bits, [])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_an_image_that_two_sites_have_is_found_at_another_size_and_brightness(
    raw: Path, add_image: Callable[..., None], scene
) -> None:
    # The fixture's image 3 of north, as exported by another hospital.
    add_image("south", "export.png", scene(3, 64)[::2, ::2] // 2)

    (group,) = compare(facts_of(raw, "north", "south"))["near_duplicates"]

    assert [(image["site"], image["image"]) for image in group["images"]] == [
        ("north", "images/north03.png"),
        ("south", "images/export.png"),
    ]
    assert 0 <= group["bits"] <= OPTIONS.near_duplicate_bits
    assert group["across_splits"] == (group["images"][0]["split"] != group["images"][1]["split"])


def test_sites_without_a_common_image_share_nothing(raw: Path) -> None:
    found = compare(facts_of(raw, "north", "south"))

    assert found["near_duplicates"] == []
    assert found["shared_subjects"] == []
    assert found["refused"] == []


def test_copies_within_a_site_are_not_duplicates_between_sites(
    raw: Path, add_image: Callable[..., None], scene
) -> None:
    add_image("north", "copy.png", scene(3, 64) // 2)

    found = compare(facts_of(raw, "north", "south"))

    assert found["near_duplicates"] == []
    assert found["sites"]["north"]["near_duplicates"] == 1


def test_a_patient_of_two_hospitals_is_counted_if_both_name_their_patients(raw: Path) -> None:
    (raw / "north" / "site.yml").write_text(r"group: '^north(\d)'")
    before = compare(facts_of(raw, "north", "south"))["shared_subjects"]
    (raw / "south" / "site.yml").write_text(
        json.dumps({"subjects": {f"south{n:02d}": "0" if n == 4 else f"s{n}" for n in range(10)}})
    )

    after = compare(facts_of(raw, "north", "south"))["shared_subjects"]

    assert before == []
    assert after == [{"sites": ["north", "south"], "shared": 1, "subjects": [1, 10]}]


def test_facts_contain_no_name_of_a_subject(raw: Path) -> None:
    (raw / "north" / "site.yml").write_text(
        json.dumps({"subjects": {f"north{n:02d}": f"Miller {n}" for n in range(10)}})
    )

    facts = json.dumps(facts_of(raw, "north"))

    assert "Miller" not in facts


def test_refused_sites_are_named(raw: Path) -> None:
    (raw / "south" / "masks" / "south00.png").unlink()

    assert compare(facts_of(raw, "north", "south"))["refused"] == ["south"]


def test_the_overview_has_a_row_for_a_site_without_usable_images(raw: Path) -> None:
    for path in (raw / "south" / "images").iterdir():
        path.write_bytes(b"")

    table = overview(facts_of(raw, "north", "south")).set_index("site")

    assert table["trains"].to_dict() == {"north": "yes", "south": "no"}
    assert table.loc["south", "used"] == 0
    assert table.loc["north", "foreground"] > 0
