"""The command of a hospital: its YAML file, its data check, its exit status."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from site_models import make_model

from fedsca_pipeline.errors import AuditError, ConfigError, UnavailableError
from fedsca_pipeline.files import open_locked, write_bytes
from fedsca_pipeline.flower.config import SiteConfig, read_site_config
from fedsca_pipeline.flower.site import command
from fedsca_pipeline.flower.site.command import main, run_site
from fedsca_pipeline.flower.site.memory_limit import OUT_OF_MEMORY


def test_paths_are_relative_to_the_yaml_file(site_file, tmp_path: Path) -> None:
    config = read_site_config(site_file())

    assert config.data == tmp_path / "data"
    assert config.certificates.key == tmp_path / "a.key"
    assert config.foundation_root == tmp_path / "work" / "02_intermediate" / "_foundations"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"site": "a b"}, "site"),
        ({"work": "data/work"}, "work: .* is inside the data folder"),
        ({"coordinator": "no-port"}, "coordinator"),
        ({"resources": {"treads": 2}}, "resources.treads"),
        ({"certificates": {"authority": "ca.crt"}}, "certificates.key"),
        ({"certificates": {"authority": "ca.crt", "key": "other.key"}}, "certificates.key"),
    ],
)
def test_an_invalid_yaml_file_is_refused_with_the_key_at_fault(site_file, changed, named) -> None:
    with pytest.raises(ConfigError, match=named):
        read_site_config(site_file(**changed))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_bytes(b"site: \xff\xfe")

    with pytest.raises(ConfigError, match="cannot be read"):
        read_site_config(tmp_path / "site.yml")


def test_valid_data_pass_the_check(site_file) -> None:
    assert main([str(site_file()), "--check"]) == 0


def test_new_images_are_segmented_with_the_site_s_own_model_and_nothing_else_is_asked_for(
    site_file, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = site_file()
    config = read_site_config(file)
    make_model(config.work / "06_models" / config.site, config.foundation_root)

    assert main([str(file), "--predict", str(tmp_path / "data" / "images")]) == 0

    masks = config.work / "07_model_output" / "predicted" / config.site / "masks"
    images = {path.stem for path in (tmp_path / "data" / "images").iterdir()}
    assert {path.stem for path in masks.iterdir()} == images
    assert "predictions.csv" in capsys.readouterr().out
    assert not (config.work / "audit.jsonl").exists()


def test_without_a_model_a_prediction_says_when_there_will_be_one(site_file, tmp_path: Path, caplog) -> None:
    assert main([str(site_file()), "--predict", str(tmp_path / "data" / "images")]) == os.EX_CONFIG
    assert "a run writes it when it ends" in caplog.text


def test_the_signal_handlers_are_restored_when_the_command_has_ended(site_file) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    main([str(site_file()), "--check"])

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_with_broken_data_the_site_does_not_join_and_names_the_file_to_fix(site_file, tmp_path: Path, caplog) -> None:
    (tmp_path / "data/masks/3.png").write_bytes(b"broken")

    assert main([str(site_file())]) == os.EX_CONFIG
    assert "masks/3.png" in caplog.text
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("damage", "status", "named"),
    [
        (lambda folder: shutil.rmtree(folder / "data"), os.EX_TEMPFAIL, "data: there is no such folder; mount it"),
        (lambda folder: emptied(folder / "data"), os.EX_TEMPFAIL, "data: the folder is empty; mount it"),
        (lambda folder: (folder / "work").touch(), os.EX_TEMPFAIL, "work"),
        (lambda folder: (folder / "work/audit.jsonl").mkdir(parents=True), os.EX_TEMPFAIL, "log cannot be written"),
        (lambda folder: write_bytes(folder / "work/audit.jsonl", b"x\n"), os.EX_CONFIG, "line 1 was changed"),
        (lambda folder: (folder / "flwr").unlink(), os.EX_CONFIG, "this folder has no flwr"),
        (lambda folder: (folder / "a.key").unlink(), os.EX_CONFIG, "certificates.key"),
        (lambda folder: (folder / "a.key").write_text("none"), os.EX_CONFIG, "a.key is not a key that Flower accepts"),
        (lambda folder: (folder / "ca.crt").write_text("none"), os.EX_CONFIG, "ca.crt holds no certificate"),
        (lambda _: None, os.EX_TEMPFAIL, "its worker died"),
    ],
)
def test_the_exit_status_of_a_command_that_cannot_join_says_whether_a_restart_can_help(
    site_file, tmp_path: Path, monkeypatch, caplog, damage: Callable[[Path], object], status: int, named: str
) -> None:
    monkeypatch.setattr(command, "worker_command", lambda _: ["false"])
    (tmp_path / "flwr").touch()
    file = site_file(engine=str(tmp_path))
    damage(tmp_path)

    assert main([str(file)]) == status
    assert named in caplog.text


def test_an_unreadable_data_folder_is_reported_with_the_status_for_a_restart(site_file, monkeypatch, caplog) -> None:
    file = site_file()

    def refuse(_folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)

    assert main([str(file)]) == os.EX_TEMPFAIL
    assert (
        "data: the folder cannot be read (Permission denied); give read access to the user that runs this"
        in caplog.text
    )


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def test_systemd_restarts_a_site_except_after_failures_that_need_a_fix(project: Path) -> None:
    unit = (project / "deploy" / "fedsca-site.service").read_text()

    assert "\nRestart=on-failure\n" in unit
    with pytest.raises(SystemExit) as wrong:
        main(["--chekc"])
    assert f"\nRestartPreventExitStatus={wrong.value.code} {os.EX_CONFIG}\n" in unit
    assert f"={os.EX_TEMPFAIL}\n" not in unit


def test_the_settings_of_a_site_are_frozen(site_file) -> None:
    config = read_site_config(site_file())

    assert isinstance(config, SiteConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.site = "b"


def test_a_second_command_for_the_same_work_folder_is_refused(site_file, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flwr").touch()
    monkeypatch.setattr(command, "STOP_SECONDS", 0.1)
    config = read_site_config(site_file(engine="bin"))

    with (
        open_locked(config.work / "flower" / "lock"),
        pytest.raises(UnavailableError, match=r"^work: another fedsca-site.*still runs in .*work"),
    ):
        run_site(config, ["false"], threading.Event())


def test_a_site_whose_log_is_broken_does_not_join(site_file, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("w")
    (folder / "flwr").touch()
    config = read_site_config(site_file(engine=str(folder), work=str(folder)))
    config.audit.write_text("not a line of an audit log\n")

    with pytest.raises(AuditError, match="line 1 was changed"):
        run_site(config, ["false"], threading.Event())


def test_a_worker_that_cannot_start_ends_the_command_with_the_fix(site_file, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("w")
    (folder / "flwr").touch()
    config = read_site_config(site_file(engine=str(folder), work=str(folder), resources={"memory": 0.1}))

    with pytest.raises(UnavailableError, match=r"resources\.memory in the site's YAML file allows 0\.1 GiB"):
        run_site(config, ["sh", "-c", f"exit {OUT_OF_MEMORY}"], threading.Event())


@pytest.fixture(autouse=True)
def _capture_log(caplog) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_check_ends_the_command_at_once(site_file, monkeypatch, number: signal.Signals) -> None:
    continued = []

    def check(_: SiteConfig) -> int:
        signal.raise_signal(number)
        continued.append(number)
        return 1

    monkeypatch.setattr(command, "check_data", check)

    assert main([str(site_file()), "--check"]) == 130
    assert not continued


@pytest.mark.parametrize(("images", "said"), [(1, "1 image, none broken"), (2, "2 images, none broken")])
def test_the_check_says_how_many_images_it_has_read(site_file, monkeypatch, caplog, images: int, said: str) -> None:
    monkeypatch.setattr(command, "check_data", lambda _: images)

    assert main([str(site_file()), "--check"]) == 0

    assert said in caplog.text
