"""The gateway of a site checks and logs each message, and computes a repeated round once."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import pytest
import torch

from fedsca_pipeline.federation.messages.codec import Manifest, MessageKind, encode
from fedsca_pipeline.flower.audit.log import AuditLog, read_log
from fedsca_pipeline.flower.config import SiteConfig, read_site_config
from fedsca_pipeline.flower.messages import documents, frames
from fedsca_pipeline.flower.site.gateway import Gateway


class FakeWorker:
    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.fails = False
        self.answer: bytes | None = None

    def start(self) -> None:
        self.asked.append("start")

    def ask(self, task, payload, seconds):
        self.asked.append((task, payload, seconds))
        return ({"failed": "it died"}, b"") if self.fails else ({}, self.answer or opened(payload))


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
def gateway(config) -> Iterator[Gateway]:
    with AuditLog(config.audit) as log:
        yield Gateway(config, FakeWorker(), log)


@pytest.fixture
def logged(config) -> Callable[..., list[list[Any]]]:
    """Returns the given keys of each line of the site's audit log."""
    return lambda *keys: [[record.get(key) for key in keys] for record in read_log(config.audit)]


def task(**changed: Any) -> dict[str, Any]:
    return {"kind": "open", "round": 0, "site": "a", "seconds": 20.0, **changed}


def test_a_task_goes_to_the_worker_with_the_shorter_of_two_limits(gateway) -> None:
    assert gateway.answer(task(), b"abc") == ({}, opened(b"abc"))
    gateway.answer(task(round=2, seconds=1e9), b"abc")

    assert [seconds for _, _, seconds in gateway.worker.asked] == [20.0, 50.0]


def test_a_round_that_is_requested_twice_is_computed_once(gateway) -> None:
    gateway.worker.answer = message("update")
    first = message("aggregate")

    assert (
        gateway.answer(task(kind="round"), first)
        == gateway.answer(task(kind="round"), first)
        == ({}, gateway.worker.answer)
    )
    assert len(gateway.worker.asked) == 1
    gateway.answer(task(kind="round"), message("aggregate", round_=2))
    assert len(gateway.worker.asked) == 2


def test_the_same_round_of_another_start_of_the_run_is_computed_again(gateway) -> None:
    gateway.worker.answer = message("update")
    starts = ["1" * 16, "2" * 16, "2" * 16]

    for begun in starts:
        gateway.answer(task(kind="round", begun=begun), message("aggregate"))

    assert [asked["begun"] for asked, _, _ in gateway.worker.asked] == starts[:2]


def test_a_repeated_open_reaches_the_worker_again_because_the_data_may_have_changed(gateway) -> None:
    for _ in range(2):
        assert gateway.answer(task(), b"abc") == ({}, opened(b"abc"))

    assert len(gateway.worker.asked) == 2


def test_a_failure_is_not_stored(gateway) -> None:
    gateway.worker.fails = True
    assert "failed" in gateway.answer(task(), b"abc")[0]
    gateway.worker.fails = False

    assert gateway.answer(task(), b"abc") == ({}, opened(b"abc"))


def test_a_task_for_another_site_never_reaches_the_worker(gateway) -> None:
    header, _ = gateway.answer(task(site="b"), b"abc")

    assert "this site is a" in header["failed"]
    assert gateway.worker.asked == []


@pytest.mark.parametrize("faulty", [{"kind": "shell"}, {"round": -1}, {"seconds": float("nan")}, {"more": 1}])
def test_a_task_of_an_unknown_form_never_reaches_the_worker(gateway, faulty) -> None:
    assert "unknown form" in gateway.answer(task(**faulty), b"abc")[0]["failed"]
    assert gateway.worker.asked == []


def test_each_message_in_or_out_has_a_line_in_the_log_even_repeated_answers_and_refusals(gateway, logged) -> None:
    gateway.answer(task(), b"abc")
    gateway.answer(task(), b"abc")
    gateway.answer(task(site="b"), b"abc")
    gateway.worker.fails = True
    gateway.answer(task(kind="finish"), b"[]")
    gateway.answer(task(kind="shell"), b"abc")

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
    "answer", [b"raw pixels", b'{"site": "a", "run": "abc", "patient": "7"}', b'{"site": "a"}', b""], ids=repr
)
def test_an_answer_of_another_form_stays_at_the_site(gateway, logged, answer) -> None:
    gateway.worker.answer = answer or b" "

    header, payload = gateway.answer(task(), b"abc")

    assert payload == b""
    assert header == {"failed": "its answer may not leave the site"}
    assert logged("direction", "refused")[-1] == ["out", header["failed"]]


def test_an_update_with_tensors_that_were_not_requested_stays_at_the_site(gateway, logged) -> None:
    gateway.worker.answer = message("update")

    assert gateway.answer(task(kind="round"), b"no message")[1] == b""
    assert "may not leave" not in str(gateway.answer(task(kind="round"), message("aggregate")))
    assert logged("refused")[1] == ["its answer may not leave the site"]


def test_the_line_is_on_the_disk_before_the_answer_is_sent(gateway, config, monkeypatch, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    listener = frames.listen(path)
    written: list[list[str]] = []
    send = frames.send

    def read_log_first(connection, header, payload=b"") -> None:
        written.append([record["direction"] for record in read_log(config.audit)])
        send(connection, header, payload)

    threading.Thread(target=gateway.serve, args=(listener,), daemon=True).start()
    try:
        with frames.connect(path, 10.0) as connection:
            send(connection, task(), b"abc")
            monkeypatch.setattr(frames, "send", read_log_first)
            assert frames.receive(connection, 1000) == ({}, opened(b"abc"))
    finally:
        listener.close()
    assert written == [["in", "out"]]


def test_a_task_that_is_too_large_for_the_socket_is_refused_with_the_parameter(
    gateway, logged, tmp_path_factory
) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    listener = frames.listen(path)
    threading.Thread(target=gateway.serve, args=(listener,), daemon=True).start()
    try:
        with frames.connect(path, 10.0) as connection:
            frames.send(connection, task(), b"abc")
            assert frames.receive(connection, 1000) == ({}, opened(b"abc"))
        with frames.connect(path, 10.0) as connection:
            frames.send(connection, {"site": "a"}, b"")
            assert "unknown form" in frames.receive(connection, 10)[0]["failed"]
        with frames.connect(path, 10.0) as connection:
            connection.sendall(frames._LENGTHS.pack(2, 2**21) + b"{}")
            assert "resources.max_message" in frames.receive(connection, 10)[0]["failed"]
    finally:
        listener.close()
    assert "resources.max_message" in logged("refused")[-1][0]


def test_if_the_log_cannot_be_written_only_a_fixed_text_leaves_the_site(
    gateway, config, logged, tmp_path_factory, caplog
) -> None:
    path = tmp_path_factory.mktemp("s") / "s"
    listener = frames.listen(path)
    threading.Thread(target=gateway.serve, args=(listener,), daemon=True).start()
    gateway.answer(task(), b"abc")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # As on a full disk, only a part of the next line fits.
        resource.setrlimit(resource.RLIMIT_FSIZE, (config.audit.stat().st_size + 10, limits[1]))
        with frames.connect(path, 10.0) as connection:
            frames.send(connection, task(), b"other")
            header, payload = frames.receive(connection, 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
        listener.close()

    assert payload == b""
    assert "audit log cannot be written" in header["failed"]
    assert len(gateway.worker.asked) == 1
    assert str(config.audit) in caplog.text
    assert logged("direction") == [["in"], ["out"]]
    assert gateway.answer(task(), b"other") == ({}, opened(b"other"))
