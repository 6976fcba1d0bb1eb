"""A federation refuses other requests at the public port, nodes without a registered key, and foreign code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import stranger
from deployed import until

from demo import PROJECT, LocalFederation, free_port
from fedsca_pipeline.flower.coordinator.superlink import APP
from fedsca_pipeline.flower.messages import frames
from fedsca_pipeline.flower.processes.engine import SITE_SOCKET, environment


@pytest.fixture(scope="module")
def federation(engine: Path) -> Iterator[LocalFederation]:
    """A SuperLink with nginx in front, and one hospital registered."""
    folder = Path(tempfile.mkdtemp(prefix="fedsca-"))
    with LocalFederation(folder, engine, free_port(), free_port()) as federation:
        federation.make_certificates(["a"])
        federation.start_superlink()
        federation.register(["a"])
        federation.start_nginx()
        yield federation
    shutil.rmtree(folder)


def post(federation: LocalFederation, path: str, key: str | None = None, length: int = 0) -> tuple[int, bytes]:
    """Send a request with exactly this path to the public port; return status and body.

    ``key`` is the public key in its header, by default the registered one. Of the body only the length is sent.
    """
    connection = stranger.connect(federation)
    stranger.begin(connection, path, stranger.public_key(federation, "a") if key is None else key, length)
    response = connection.getresponse()
    return response.status, response.read()


PATHS = pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/runtime/get-nodes",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/fleet/%252e%252e/control/list-runs",
        "/v1/fleet/;/../../control/list-runs",
        "//v1//control/list-runs",
        "/V1/CONTROL/list-runs",
        "/docs",
        "/openapi.json",
        "/",
    ],
)


@PATHS
def test_at_the_public_port_nginx_refuses_everything_except_the_fleet_interface(federation, path) -> None:
    status, body = post(federation, path)

    assert status == 404
    assert b"nginx" in body


@PATHS
@pytest.mark.parametrize("key", ["", "c3RyYW5nZXI="], ids=["no key", "unknown key"])
def test_without_a_registered_key_nginx_refuses_every_request(federation, path: str, key: str) -> None:
    status, body = post(federation, path, key)

    assert status == 412
    assert "deploy/register.sh" in json.loads(body)["extra"]


SMALL, LARGEST = 64 * 2**10, 8 * 2**20


@pytest.mark.parametrize(
    ("call", "most"), [("activate-node", SMALL), ("push-messages", SMALL), ("push-object", LARGEST)]
)
def test_nginx_refuses_larger_bodies_than_a_request_can_have(federation, call: str, most: int) -> None:
    assert post(federation, f"/v1/fleet/{call}", length=most + 1)[0] == 413
    assert post(federation, f"/v1/fleet/{call}", "", length=most + 1)[0] == 412


def test_bodies_without_a_registered_key_never_reach_the_superlink(federation) -> None:
    before = stranger.peak_memory(federation, "superlink")

    with stranger.held([stranger.push(federation, "", LARGEST) for _ in range(32)]) as bodies:
        answers = stranger.answers(bodies)

    assert answers == [412] * 32
    assert stranger.peak_memory(federation, "superlink") - before < LARGEST
    assert stranger.peak_memory(federation, "nginx") < 2**27


@pytest.mark.parametrize(("call", "length", "most"), [("push-object", LARGEST, 4), ("push-messages", SMALL, 8)])
def test_a_slow_hospital_keeps_out_itself_and_no_other_at_its_address(
    federation, keys, call: str, length: int, most: int
) -> None:
    with stranger.held([stranger.push(federation, keys[0], length, call) for _ in range(32)]) as bodies:
        itself, other = (post(federation, f"/v1/fleet/{call}", key)[0] for key in keys[:2])
        answers = stranger.answers(bodies)

    assert (itself, other) == (503, 401)
    assert answers.count(503) == 32 - most
    assert coordinator_memory(federation) < 2**30


@pytest.mark.slow
def test_the_largest_bodies_of_all_hospitals_fit_in_the_memory_of_the_coordinator(federation, keys) -> None:
    with stranger.held([stranger.push(federation, key, LARGEST) for key in keys[:8] for _ in range(4)]) as bodies:
        one_more = post(federation, "/v1/fleet/push-object", keys[8])
        answers = stranger.answers(bodies)

    assert answers == [401] * 32
    assert one_more[0] == 503
    assert coordinator_memory(federation) < 2**30


def coordinator_memory(federation: LocalFederation) -> int:
    return stranger.peak_memory(federation, "superlink") + stranger.peak_memory(federation, "nginx")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_hospitals_finish_their_run_while_a_stranger_holds_connections_and_sends_bodies(new_deployed) -> None:
    deployed, stop = new_deployed(), threading.Event()
    federation = deployed.federation

    with ThreadPoolExecutor() as threads:
        connections = threads.submit(stranger.besiege, federation, stop)
        bodies = threads.submit(stranger.bombard, federation, "", LARGEST, stop)
        try:
            output = deployed.run(federation__rounds=4)
        finally:
            stop.set()

    # Each time lasts 9 s.
    assert connections.result() > 60 / 9
    assert bodies.result().keys() == {412}
    assert re.findall(r"round (\d)/4: loss .*? 3 of 3 sites", output) == ["1", "2", "3", "4"]
    assert coordinator_memory(federation) < 2**30


@pytest.fixture(scope="module")
def keys(federation) -> list[str]:
    """Nine keys that nginx knows; the SuperLink does not."""
    names = [f"hospital-{index}" for index in range(9)]
    for name in names:
        (federation.certificates / "hospitals" / f"{name}.map").write_text(f'"{name}" "{name}";\n')
    federation.processes["nginx"].send(signal.SIGHUP)
    until(lambda: post(federation, "/v1/fleet/pull-messages", names[-1])[0] != 412)
    return names


def test_idle_connections_keep_nobody_out(federation) -> None:
    with stranger.held([stranger.connect(federation) for _ in range(200)]):
        status, _ = post(federation, "/v1/fleet/pull-messages")

    assert status == 401


@pytest.mark.parametrize(("suite", "accepted"), [("ECDHE+AESGCM", True), ("ECDHE+AES:!AESGCM", False)])
def test_of_tls_1_2_only_suites_that_authenticate_are_accepted(federation, suite: str, accepted: bool) -> None:
    client = ssl.create_default_context(cafile=str(federation.certificates / "ca.crt"))
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers(suite)

    with socket.create_connection(("localhost", federation.public_port)) as connection:
        if accepted:
            client.wrap_socket(connection, server_hostname="localhost").close()
        else:
            with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
                client.wrap_socket(connection, server_hostname="localhost")


def test_only_its_user_can_read_the_database_of_the_superlink(federation) -> None:
    assert [path.stat().st_mode & 0o777 for path in federation.folder.glob("state.db*")]
    assert {path.stat().st_mode & 0o777 for path in federation.folder.glob("state.db*")} == {0o600}


def test_the_fleet_interface_is_reached_through_the_public_port(federation) -> None:
    status, body = post(federation, "/v1/fleet/pull-messages")

    assert status != 404
    assert b"nginx" not in body


def supernode(federation: LocalFederation, authority: Path, key: Path | None) -> str:
    """Start a SuperNode that must fail; return its output."""
    command = [str(federation.engine / "flower-supernode"), "--superlink", f"localhost:{federation.public_port}"]
    command += ["--root-certificates", str(authority), "--isolation", "process", "--port", str(free_port())]
    command += ["--max-retries", "1", *(["--auth-supernode-private-key", str(key)] if key else [])]
    return failing(federation, command)


def failing(federation: LocalFederation, command: Sequence[str]) -> str:
    env = environment(federation.engine, federation.folder / "stranger")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_node_without_a_key_is_refused(federation) -> None:
    output = supernode(federation, federation.certificates / "ca.crt", None)

    assert "The key is not registered in nginx" in output


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known to nginx only"])
def test_a_node_with_an_unregistered_key_is_refused(federation, tmp_path: Path, known: bool) -> None:
    key = tmp_path / "stranger.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    if known:
        # Without flwr in PATH the script ends before the SuperLink.
        script = ["bash", str(PROJECT / "deploy" / "register.sh"), str(federation.certificates)]
        script += ["stranger", str(key.with_suffix(".key.pub"))]
        assert subprocess.run(script, env={"PATH": os.defpath}, check=False).returncode == 127
        header = stranger.public_key(federation, "stranger")
        until(lambda: post(federation, "/v1/fleet/pull-messages", header)[0] != 412)

    output = supernode(federation, federation.certificates / "ca.crt", key)

    assert "Failed to activate SuperNode" in output
    assert ("The key is not registered in nginx" in output) != known
    assert ("No SuperNode found with the given public key" in federation.log("superlink")) == known


@pytest.mark.slow
def test_an_unregistered_hospital_is_disconnected_at_once_and_returns_only_with_a_new_key(federation) -> None:
    new_key(federation)
    federation.register(["b"])
    with connected(federation) as node:
        (number,) = [entry["node-id"] for entry in flwr(federation, "list")["nodes"] if entry["status"] == "online"]
        assert flwr(federation, "unregister", number)["success"]
        assert node.wait(120) == 0

    assert "Failed to activate SuperNode" in supernode(
        federation, federation.certificates / "ca.crt", federation.certificates / "b.key"
    )
    again = flwr(federation, "register", str(federation.certificates / "b.pub"), "--name", "b")
    assert "Public key already in use" in again["error-message"]
    new_key(federation)
    federation.register(["b"])
    with connected(federation):
        assert [entry["status"] for entry in flwr(federation, "list")["nodes"]].count("online") == 1


def new_key(federation: LocalFederation) -> None:
    """Make a new key for hospital b, with its public key where ``register`` expects it."""
    key = federation.certificates / "b.key"
    key.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    key.with_suffix(".key.pub").replace(federation.certificates / "b.pub")


def flwr(federation: LocalFederation, command: str, *given: str) -> dict[str, Any]:
    """Return the JSON that ``flwr supernode`` prints."""
    words = [str(federation.engine / "flwr"), "supernode", command, *given[:1], "coordinator", *given[1:]]
    env = environment(federation.engine, federation.home)
    done = subprocess.run([*words, "--format", "json"], env=env, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)


@contextmanager
def connected(federation: LocalFederation) -> Iterator[subprocess.Popen]:
    """Run the SuperNode of hospital b for the duration of the block, which starts when the SuperNode is connected."""
    command = [str(federation.engine / "flower-supernode"), "--superlink", f"localhost:{federation.public_port}"]
    command += ["--root-certificates", str(federation.certificates / "ca.crt"), "--isolation", "process"]
    command += ["--port", str(free_port()), "--auth-supernode-private-key", str(federation.certificates / "b.key")]
    federation.start("node", command, environment(federation.engine, federation.folder / "node"))
    start = len(federation.log("node"))
    until(lambda: "SuperNode ID" in federation.log("node")[start:])
    try:
        yield federation.processes["node"]
    finally:
        federation.processes["node"].end()


def test_a_node_refuses_a_coordinator_with_a_wrong_certificate(federation, tmp_path: Path) -> None:
    script = PROJECT / "deploy" / "make_authority.sh"
    subprocess.run(["bash", str(script), str(tmp_path / "other"), "localhost"], check=True)

    output = supernode(federation, tmp_path / "other" / "ca.crt", federation.certificates / "a.key")

    assert "CERTIFICATE_VERIFY_FAILED" in output


def test_a_superexec_without_the_secret_gets_no_task(federation, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 48)
    command = [str(federation.engine / "flower-superexec"), "--root-certificates"]
    command += [str(federation.certificates / "ca.crt"), "--superexec-auth-secret-file", str(secret)]
    command += ["--runtime-api-address", f"127.0.0.1:{federation.superlink_port}"]

    env = environment(federation.engine, federation.folder / "stranger")
    subprocess.run(command, env=env, capture_output=True, timeout=120, check=False)

    assert "SuperExec authentication failed" in federation.log("superlink")


CLIENT_APP = """
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from unittest.mock import MagicMock

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp

from fedsca_pipeline.flower.site import guard

bundle = build_fab_from_disk(Path(sys.argv.pop()))


def pulled(_client):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    task = ConfigRecord({"kind": "prepare", "seconds": 60.0, "payload": b"terms"})
    message = Message(RecordDict({"task": task}), dst_node_id=2, message_type="train")
    context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
    run = replace(Run.create_empty(1), fab_id="fedsca/fedsca", fab_version="1.0.0")
    return message, context, run, Fab(sha256(bundle).hexdigest(), bundle, {})


def pushed(_client, reply, _context):
    print("pushed:", reply.error.reason if reply.has_error() else dict(reply.content["answer"]))


run_clientapp.RuntimeHttpClient = MagicMock()
run_clientapp.pull_task_input, run_clientapp.push_message = pulled, pushed
guard.main()
"""


def client_app(engine: Path, folder: Path, app: Path) -> tuple[str, list[bytes]]:
    """Play a SuperNode that gives its ClientApp one message of a run of this app, and a gateway that answers it.

    Return the message that the ClientApp pushed, and the payloads that the gateway received.
    """
    received = []
    with frames.listen(folder / "site.sock") as listener:

        def gateway() -> None:
            with suppress(OSError):
                connection, _ = listener.accept()
                received.append(frames.receive(connection, 100)[1])
                frames.send(connection, {}, b"prepared")

        thread = threading.Thread(target=gateway)
        thread.start()
        command = [str(engine / "python"), "-c", CLIENT_APP, "--insecure", "--token", "token", str(app)]
        env = environment(engine, folder / "flwr", {SITE_SOCKET: str(folder / "site.sock")})
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    (output,) = re.findall("^pushed: (.*)$", done.stdout, re.MULTILINE) or [done.stdout + done.stderr]
    return output, received


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An app with the name of this project's app and other code."""
    app = Path(shutil.copytree(APP, tmp_path / "foreign"))
    (app / "fedsca_app.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit\n")
    return app


def test_a_run_of_the_packages_app_reaches_the_gateway_of_the_site(engine: Path, tmp_path: Path) -> None:
    assert client_app(engine, tmp_path, APP) == ("{'payload': b'prepared'}", [b"terms"])


def test_a_hospital_neither_runs_nor_unpacks_foreign_code(engine: Path, foreign: Path, tmp_path: Path) -> None:
    output, received = client_app(engine, tmp_path, foreign)

    assert "ForeignBundleError" in output
    assert "install the same version of fedsca_pipeline at the coordinator and here" in output
    assert received == []
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "flwr").rglob("fedsca_app*"))
