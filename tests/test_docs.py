"""README.md and docs/: links lead somewhere, the index lists every page, the glossary explains every word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

WORDS = (
    *("site", "round", "foundation", "block", "adapter", "decoder", "shared tensors", "update", "aggregate"),
    *("local model", "general model", "chosen model", "strategy", "fleet", "FEL", "LAT", "SGCA", "self weight"),
    *("base", "manifest", "privacy ledger"),
)


def prose(page: Path) -> str:
    """Return a page's text without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and images, in their order."""
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        repeated = sum(1 for known in found if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", known))
        found.add(f"{anchor}-{repeated}" if repeated else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert not broken


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"

    listed = {link.partition("#")[0] for link in links(index)}

    assert {page.name for page in PAGES[1:]} - {"README.md"} <= listed


def test_the_readme_links_to_the_index_and_shows_a_picture() -> None:
    targets = links(ROOT / "README.md")

    assert "docs/README.md" in targets
    assert any(target.endswith(".png") for target in targets)


@pytest.mark.parametrize("word", WORDS)
def test_the_glossary_explains_a_word_and_links_to_its_page(word: str) -> None:
    rows = [row for row in prose(ROOT / "docs" / "glossary.md").splitlines() if row.startswith(f"| **{word}** |")]

    assert len(rows) == 1
    assert re.search(r"\]\(\w+\.md", rows[0])
