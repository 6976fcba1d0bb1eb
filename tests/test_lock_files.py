"""The lock files: what `make install` and `make engine` install is pinned, hashed, and what pyproject.toml asks for."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = {
    "requirements.lock": PROJECT["dependencies"],
    "requirements-dev.lock": [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]],
    "requirements-flower.lock": PROJECT["optional-dependencies"]["flower"],
}
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")
# Where the tests look: the platforms of README.md.
PLATFORMS = [
    {"python_full_version": f"{python}.0", "python_version": python, "sys_platform": system}
    for python in ("3.11", "3.12", "3.13")
    for system in ("linux", "darwin", "win32")
]


def lines_of(name: str) -> list[str]:
    """Return the file's requirements with their hashes, one a line, without comments."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def pinned(name: str, platform: dict[str, str] | None = None) -> dict[str, str]:
    """Return the version of each package, on one platform or on any."""
    found = {}
    for line in lines_of(name):
        requirement = Requirement(line.partition("--hash")[0])
        if platform is None or requirement.marker is None or requirement.marker.evaluate(platform):
            (only,) = requirement.specifier
            assert only.operator == "==", line
            found[canonicalize_name(requirement.name)] = only.version
    return found


@pytest.mark.parametrize("name", ASKED)
def test_every_line_of_a_lock_file_has_hashes_and_no_address(name: str) -> None:
    for line in lines_of(name):
        requirement, *hashes = re.split(r"\s+(?=--hash)", line)
        assert hashes, requirement
        assert all(HASH.fullmatch(one.strip()) for one in hashes), requirement
        assert not re.search(r"://|@|--", requirement), requirement
    assert "://" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda one: f"{one['python_version']} {one['sys_platform']}")
def test_a_lock_file_has_every_package_of_pyproject_in_a_version_it_allows(name: str, platform: dict[str, str]) -> None:
    """It fails when pyproject.toml has changed and `make lock` has not run."""
    found = pinned(name, platform) | pinned("requirements-torch.txt")

    for requirement in map(Requirement, ASKED[name]):
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, requirement
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_users_and_developers_have_the_same_versions() -> None:
    users, developers = pinned("requirements.lock"), pinned("requirements-dev.lock")

    assert users.items() < developers.items()


@pytest.mark.parametrize("name", ASKED)
def test_torch_and_its_cuda_libraries_are_not_in_a_lock_file(name: str) -> None:
    assert not [package for package in pinned(name) if package in ("torch", "triton") or package.startswith("nvidia")]


def test_make_installs_nothing_without_hashes_but_torch_and_the_project() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "install", "engine"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )

    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    locked = [line for line in installs if "--require-hashes --no-deps --requirement" in line]
    assert [line.split()[-1] for line in locked] == ["requirements-dev.lock", "requirements-flower.lock"]
    others = [line.partition("--disable-pip-version-check")[2].split() for line in installs if line not in locked]
    project = ["--no-deps", "--editable", "."]
    assert others == [["--requirement", "requirements-torch.txt"], project, project]
