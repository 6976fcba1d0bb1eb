"""The hospital's command: its file, its data check, and what it answers the shim."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsca_pipeline.errors import AuditError, ConfigError, UnavailableError
from fedsca_pipeline.federation.messages.codec import encode
from fedsca_pipeline.federation.messages.manifest import Manifest, MessageKind
from fedsca_pipeline.files import write_bytes
from fedsca_pipeline.flower.audit.log import AuditLog, read_log
from fedsca_pipeline.flower.config import SiteConfig, read_site_config
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.processes.lock import locked
from fedsca_pipeline.flower.site import command as site
from fedsca_pipeline.flower.site.command import main, run_site
from fedsca_pipeline.flower.site.desk import Desk
from fedsca_pipeline.flower.site.memory_limit import OUT_OF_MEMORY


def test_paths_are_relative_to_the_file(site_file, tmp_path: Path) -> None:
    config = read_site_config(site_file())

    assert config.data == tmp_path / "data"
    assert config.certificates.key == tmp_path / "a.key"
    assert config.foundation_root == tmp_path / "work" / "02_intermediate" / "_foundations"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"site": "a b"}, "site"),
        ({"work": "data/work"}, "work: .* lies in the data folder"),
        ({"coordinator": "no-port"}, "coordinator"),
        ({"resources": {"treads": 2}}, "resources.treads"),
        ({"certificates": {"authority": "ca.crt"}}, "certificates.key"),
        ({"certificates": {"authority": "ca.crt", "key": "other.key"}}, "certificates.key"),
    ],
)
def test_a_wrong_file_is_refused_by_the_key_at_fault(site_file, changed, named) -> None:
    with pytest.raises(ConfigError, match=named):
        read_site_config(site_file(**changed))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.yml").write_bytes(b"site: \xff\xfe")

    with pytest.raises(ConfigError, match="cannot be read"):
        read_site_config(tmp_path / "site.yml")


def test_sound_data_pass_the_check(site_file) -> None:
    assert main([str(site_file()), "--check"]) == 0


def test_signals_mean_what_they_did_once_the_command_has_ended(site_file) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    main([str(site_file()), "--check"])

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_with_broken_data_the_site_does_not_join_and_says_what_to_mend(site_file, tmp_path: Path, caplog) -> None:
    (tmp_path / "data/masks/3.png").write_bytes(b"broken")

    assert main([str(site_file())]) == os.EX_CONFIG
    assert "masks/3.png" in caplog.text
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("spoil", "status", "named"),
    [
        (lambda folder: shutil.rmtree(folder / "data"), os.EX_TEMPFAIL, "data: there is no such folder; mount it"),
        (lambda folder: emptied(folder / "data"), os.EX_TEMPFAIL, "data: it is empty; mount it"),
        (lambda folder: (folder / "work").touch(), os.EX_TEMPFAIL, "work"),
        (lambda folder: (folder / "work/audit.jsonl").mkdir(parents=True), os.EX_TEMPFAIL, "log cannot be written"),
        (lambda folder: write_bytes(folder / "work/audit.jsonl", b"x\n"), os.EX_CONFIG, "not as it was written"),
        (lambda folder: (folder / "flwr").unlink(), os.EX_CONFIG, "no flwr there"),
        (lambda folder: (folder / "a.key").unlink(), os.EX_CONFIG, "certificates.key"),
        (lambda folder: (folder / "a.key").write_text("none"), os.EX_CONFIG, "a.key is no key that Flower takes"),
        (lambda folder: (folder / "ca.crt").write_text("none"), os.EX_CONFIG, "ca.crt holds no certificate"),
        (lambda _: None, os.EX_TEMPFAIL, "its worker died"),
    ],
)
def test_a_command_that_cannot_join_says_by_its_status_whether_it_is_worth_trying_again(
    site_file, tmp_path: Path, monkeypatch, caplog, spoil: Callable[[Path], object], status: int, named: str
) -> None:
    monkeypatch.setattr(site, "worker_command", lambda _: ["false"])
    (tmp_path / "flwr").touch()
    file = site_file(engine=str(tmp_path))
    spoil(tmp_path)

    assert main([str(file)]) == status
    assert named in caplog.text


def test_a_data_folder_that_may_not_be_read_now_is_tried_again_and_says_so(site_file, monkeypatch, caplog) -> None:
    file = site_file()

    def refuse(_folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refuse)

    assert main([str(file)]) == os.EX_TEMPFAIL
    assert "data: it cannot be read (Permission denied); let the user who runs this read it" in caplog.text


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def test_systemd_starts_a_site_again_but_for_what_somebody_must_mend(project: Path) -> None:
    unit = (project / "deploy" / "fedsca-site.service").read_text()

    assert "\nRestart=on-failure\n" in unit
    with pytest.raises(SystemExit) as wrong:
        main(["--chekc"])
    assert f"\nRestartPreventExitStatus={wrong.value.code} {os.EX_CONFIG}\n" in unit
    assert f"={os.EX_TEMPFAIL}\n" not in unit


class FakeWorker:
    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.fails = False
        self.says: bytes | None = None

    def start(self) -> None:
        self.asked.append("start")

    def ask(self, task, payload, seconds):
        self.asked.append((task, payload, seconds))
        return ({"failed": "it died"}, b"") if self.fails else ({}, self.says or opened(payload))


def opened(payload: bytes) -> bytes:
    return documents.write(documents.Opened(site="a", run=sha256(payload).hexdigest()[:16]))


def message(kind: MessageKind, round_: int = 1) -> bytes:
    manifest = Manifest(
        kind=kind, run="0" * 16, round=round_, site="a", base_hash="1" * 16, samples=3, dtype="fp16", relative=True
    )
    return encode(manifest, {"low": torch.zeros(2)})


@pytest.fixture
def config(site_file) -> SiteConfig:
    return read_site_config(site_file(resources={"task_seconds": 50, "max_message": 1}))


@pytest.fixture
def desk(config) -> Iterator[Desk]:
    with AuditLog(config.audit) as log:
        yield Desk(config, FakeWorker(), log)


@pytest.fixture
def logged(config) -> Callable[..., list[list[Any]]]:
    """The lines of the site's audit log, of each what is asked for."""
    return lambda *keys: [[record.get(key) for key in keys] for record in read_log(config.audit)]


def task(**changed: Any) -> dict[str, Any]:
    return {"kind": "open", "round": 0, "site": "a", "seconds": 20.0, **changed}


def test_a_task_goes_to_the_worker_with_the_shorter_of_two_limits(desk) -> None:
    assert desk.answer(task(), b"abc") == ({}, opened(b"abc"))
    desk.answer(task(round=2, seconds=1e9), b"abc")

    assert [seconds for _, _, seconds in desk.worker.asked] == [20.0, 50.0]


def test_a_round_that_comes_twice_is_worked_on_once(desk) -> None:
    desk.worker.says = message("update")
    first = message("aggregate")

    assert desk.answer(task(kind="round"), first) == desk.answer(task(kind="round"), first) == ({}, desk.worker.says)
    assert len(desk.worker.asked) == 1
    desk.answer(task(kind="round"), message("aggregate", round_=2))
    assert len(desk.worker.asked) == 2


def test_the_same_round_of_another_beginning_is_worked_on_for_that_one(desk) -> None:
    desk.worker.says = message("update")
    beginnings = ["1" * 16, "2" * 16, "2" * 16]

    for begun in beginnings:
        desk.answer(task(kind="round", begun=begun), message("aggregate"))

    assert [asked["begun"] for asked, _, _ in desk.worker.asked] == beginnings[:2]


def test_data_may_have_changed_when_the_same_question_about_them_comes_again(desk) -> None:
    for _ in range(2):
        assert desk.answer(task(), b"abc") == ({}, opened(b"abc"))

    assert len(desk.worker.asked) == 2


def test_a_failure_is_not_remembered(desk) -> None:
    desk.worker.fails = True
    assert "failed" in desk.answer(task(), b"abc")[0]
    desk.worker.fails = False

    assert desk.answer(task(), b"abc") == ({}, opened(b"abc"))


def test_a_task_for_another_site_never_reaches_the_worker(desk) -> None:
    said, _ = desk.answer(task(site="b"), b"abc")

    assert "this site is a" in said["failed"]
    assert desk.worker.asked == []


@pytest.mark.parametrize("faulty", [{"kind": "shell"}, {"round": -1}, {"seconds": float("nan")}, {"more": 1}])
def test_a_task_of_no_known_form_never_reaches_the_worker(desk, faulty) -> None:
    assert "unknown form" in desk.answer(task(**faulty), b"abc")[0]["failed"]
    assert desk.worker.asked == []


def test_all_that_comes_and_leaves_has_its_line_repeated_answers_and_refusals_too(desk, logged) -> None:
    desk.answer(task(), b"abc")
    desk.answer(task(), b"abc")
    desk.answer(task(site="b"), b"abc")
    desk.worker.fails = True
    desk.answer(task(kind="finish"), b"[]")
    desk.answer(task(kind="shell"), b"abc")

    assert logged("direction", "kind", "answer_to", "refused") == [
        ["in", "open", None, None], ["out", "open", 1, None],
        ["in", "open", None, None], ["out", "open", 3, None],
        ["in", "open", None, None], ["out", "open", 5, "this site is a, not b"],
        ["in", "finish", None, None], ["out", "finish", 7, "it died"],
        ["in", "unknown", None, None], ["out", "unknown", 9, logged("refused")[9][0]],
    ]  # fmt: skip
    assert "unknown form" in logged("refused")[9][0]
    assert logged("bytes", "sha256")[1] == [len(opened(b"abc")), sha256(opened(b"abc")).hexdigest()]


@pytest.mark.parametrize(
    "says", [b"raw pixels", b'{"site": "a", "run": "abc", "patient": "7"}', b'{"site": "a"}', b""], ids=repr
)
def test_an_answer_of_another_form_than_may_leave_stays(desk, logged, says) -> None:
    desk.worker.says = says or b" "

    said, answer = desk.answer(task(), b"abc")

    assert answer == b""
    assert said == {"failed": "its answer was nothing that may leave the site"}
    assert logged("direction", "refused")[-1] == ["out", said["failed"]]


def test_an_update_of_tensors_that_were_not_asked_for_stays(desk, logged) -> None:
    desk.worker.says = message("update")

    assert desk.answer(task(kind="round"), b"no message")[1] == b""
    assert "may not leave" not in str(desk.answer(task(kind="round"), message("aggregate")))
    assert logged("refused")[1] == ["its answer was nothing that may leave the site"]


def test_the_line_is_on_the_disk_before_the_answer_is_handed_over(desk, config, monkeypatch, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    listener = frames.listen(path)
    written: list[list[str]] = []
    send = frames.send

    def record_first(line, header, payload=b"") -> None:
        written.append([record["direction"] for record in read_log(config.audit)])
        send(line, header, payload)

    threading.Thread(target=desk.serve, args=(listener,), daemon=True).start()
    try:
        with frames.connect(path, 10.0) as line:
            send(line, task(), b"abc")
            monkeypatch.setattr(frames, "send", record_first)
            assert frames.receive(line, 1000) == ({}, opened(b"abc"))
    finally:
        listener.close()
    assert written == [["in", "out"]]


def test_through_its_socket_a_task_too_large_is_refused_by_the_parameter(desk, logged, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    listener = frames.listen(path)
    threading.Thread(target=desk.serve, args=(listener,), daemon=True).start()
    try:
        with frames.connect(path, 10.0) as line:
            frames.send(line, task(), b"abc")
            assert frames.receive(line, 1000) == ({}, opened(b"abc"))
        with frames.connect(path, 10.0) as line:
            frames.send(line, {"site": "a"}, b"")
            assert "unknown form" in frames.receive(line, 10)[0]["failed"]
        with frames.connect(path, 10.0) as line:
            line.sendall(frames._LENGTHS.pack(2, 2**21) + b"{}")
            assert "resources.max_message" in frames.receive(line, 10)[0]["failed"]
    finally:
        listener.close()
    assert "resources.max_message" in logged("refused")[-1][0]


def test_where_the_log_cannot_be_written_nothing_leaves_but_the_fixed_words_that_say_so(
    desk, config, logged, tmp_path_factory, caplog
) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    listener = frames.listen(path)
    threading.Thread(target=desk.serve, args=(listener,), daemon=True).start()
    desk.answer(task(), b"abc")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # As on a full disk: the file takes a part of the next line, and no more.
        resource.setrlimit(resource.RLIMIT_FSIZE, (config.audit.stat().st_size + 10, limits[1]))
        with frames.connect(path, 10.0) as line:
            frames.send(line, task(), b"other")
            said, payload = frames.receive(line, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
        listener.close()

    assert payload == b""
    assert "audit log cannot be written" in said["failed"]
    assert len(desk.worker.asked) == 1
    assert str(config.audit) in caplog.text
    assert logged("direction") == [["in"], ["out"]]
    assert desk.answer(task(), b"other") == ({}, opened(b"other"))


def test_a_site_config_cannot_be_changed(site_file) -> None:
    config = read_site_config(site_file())

    assert isinstance(config, SiteConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.site = "b"


def test_a_second_command_for_the_same_work_folder_is_refused(site_file, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flwr").touch()
    monkeypatch.setattr(site, "_STOP_SECONDS", 0.1)
    config = read_site_config(site_file(engine="bin"))

    with (
        locked(config.work / "flower" / "lock"),
        pytest.raises(UnavailableError, match=r"^work: another fedsca-site.*still runs in .*work"),
    ):
        run_site(config, ["false"], threading.Event())


def test_a_site_whose_log_is_broken_does_not_join(site_file, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("w")
    (folder / "flwr").touch()
    config = read_site_config(site_file(engine=str(folder), work=str(folder)))
    config.audit.write_text("no line of ours\n")

    with pytest.raises(AuditError, match="line 1 is not as it was written"):
        run_site(config, ["false"], threading.Event())


def test_a_worker_that_cannot_start_ends_the_command_with_the_cure(site_file, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("w")
    (folder / "flwr").touch()
    config = read_site_config(site_file(engine=str(folder), work=str(folder), resources={"memory": 0.1}))

    with pytest.raises(UnavailableError, match=r"resources\.memory in the site's YAML file allows 0\.1 GiB"):
        run_site(config, ["sh", "-c", f"exit {OUT_OF_MEMORY}"], threading.Event())


@pytest.fixture(autouse=True)
def _hear_errors(caplog) -> None:
    caplog.set_level(logging.INFO)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_check_ends_the_command_at_once(site_file, monkeypatch, number: signal.Signals) -> None:
    went_on = []

    def check(_: SiteConfig) -> int:
        signal.raise_signal(number)
        went_on.append(number)
        return 1

    monkeypatch.setattr(site, "check_data", check)

    assert main([str(site_file()), "--check"]) == 130
    assert not went_on


def test_a_process_that_cannot_be_started_is_tried_again(tmp_path: Path, monkeypatch) -> None:
    stopped, tries = threading.Event(), []

    def no_room(*_: Any, **__: Any) -> None:
        tries.append(1)
        if len(tries) == 3:
            stopped.set()
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(site, "Leashed", no_room)
    monkeypatch.setattr(site, "_RESTART_SECONDS", 0.01)
    with (tmp_path / "lock").open("w") as lock:
        site._keep_alive(["flower-supernode"], {}, lock, stopped)

    assert len(tries) == 3
