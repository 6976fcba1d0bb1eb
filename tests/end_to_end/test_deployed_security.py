"""Who is turned away: strangers at the public port, nodes without the right key, foreign code at a hospital."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
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
        federation.found(["a"])
        federation.start_superlink()
        federation.start_nginx()
        federation.register(["a"])
        yield federation
    shutil.rmtree(folder)


def post(federation: LocalFederation, path: str) -> tuple[int, bytes]:
    """Send a request to the public port, its path exactly as given."""
    trusted = ssl.create_default_context(cafile=str(federation.certificates / "ca.crt"))
    line = http.client.HTTPSConnection("localhost", federation.public_port, context=trusted, timeout=60)
    line.putrequest("POST", path)
    line.putheader("Content-Type", "application/protobuf")
    line.putheader("Content-Length", "0")
    line.endheaders()
    answer = line.getresponse()
    return answer.status, answer.read()


@pytest.mark.parametrize(
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
def test_at_the_public_port_nginx_itself_turns_all_but_the_fleet_interface_away(federation, path) -> None:
    status, said = post(federation, path)

    assert status == 404
    assert b"nginx" in said


def test_the_fleet_interface_is_reached_through_the_public_port(federation) -> None:
    status, said = post(federation, "/v1/fleet/pull-messages")

    assert status != 404
    assert b"nginx" not in said


def supernode(federation: LocalFederation, authority: Path, key: Path | None) -> str:
    """Start a SuperNode that must fail; return what it said."""
    command = [str(federation.engine / "flower-supernode"), "--superlink", f"localhost:{federation.public_port}"]
    command += ["--root-certificates", str(authority), "--isolation", "process", "--port", str(free_port())]
    command += ["--max-retries", "1", *(["--auth-supernode-private-key", str(key)] if key else [])]
    return failing(federation, command)


def failing(federation: LocalFederation, command: Sequence[str]) -> str:
    surroundings = environment(federation.engine, federation.folder / "stranger")
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_node_without_a_key_is_refused(federation) -> None:
    said = supernode(federation, federation.certificates / "ca.crt", None)

    assert "SuperNode authentication is enabled" in said


def test_a_node_with_a_key_that_is_not_listed_is_refused(federation, tmp_path: Path) -> None:
    key = tmp_path / "stranger.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)

    said = supernode(federation, federation.certificates / "ca.crt", key)

    assert "Failed to activate SuperNode" in said
    assert "No SuperNode found with the given public key" in federation.log("superlink")


@pytest.mark.slow
def test_a_hospital_taken_off_the_list_is_out_at_once_and_comes_back_with_a_new_key_only(federation) -> None:
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
    """Make hospital b's key, and its public half as ``register`` looks for it."""
    key = federation.certificates / "b.key"
    key.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
    key.with_suffix(".key.pub").replace(federation.certificates / "b.pub")


def flwr(federation: LocalFederation, command: str, *given: str) -> dict[str, Any]:
    """Return what ``flwr supernode`` says."""
    words = [str(federation.engine / "flwr"), "supernode", command, *given[:1], "coordinator", *given[1:]]
    surroundings = environment(federation.engine, federation.home)
    done = subprocess.run([*words, "--format", "json"], env=surroundings, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)


@contextmanager
def connected(federation: LocalFederation) -> Iterator[subprocess.Popen]:
    """Run hospital b's SuperNode for the duration of the block, from when it is connected."""
    command = [str(federation.engine / "flower-supernode"), "--superlink", f"localhost:{federation.public_port}"]
    command += ["--root-certificates", str(federation.certificates / "ca.crt"), "--isolation", "process"]
    command += ["--port", str(free_port()), "--auth-supernode-private-key", str(federation.certificates / "b.key")]
    federation.start("node", command, environment(federation.engine, federation.folder / "node"))
    said = len(federation.log("node"))
    until(lambda: "SuperNode ID" in federation.log("node")[said:])
    try:
        yield federation.processes["node"]
    finally:
        federation.processes["node"].end()


def test_a_node_refuses_a_coordinator_with_a_wrong_certificate(federation, tmp_path: Path) -> None:
    script = PROJECT / "deploy" / "make_authority.sh"
    subprocess.run(["bash", str(script), str(tmp_path / "other"), "localhost"], check=True)

    said = supernode(federation, tmp_path / "other" / "ca.crt", federation.certificates / "a.key")

    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_a_superexec_without_the_secret_gets_no_task(federation, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 48)
    command = [str(federation.engine / "flower-superexec"), "--root-certificates"]
    command += [str(federation.certificates / "ca.crt"), "--superexec-auth-secret-file", str(secret)]
    command += ["--runtime-api-address", f"127.0.0.1:{federation.superlink_port}"]

    surroundings = environment(federation.engine, federation.folder / "stranger")
    subprocess.run(command, env=surroundings, capture_output=True, timeout=120, check=False)

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

from fedsca_pipeline.flower import guard

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
    """Be a SuperNode that gives its ClientApp one message of a run of this app.

    Return what the ClientApp pushed, and what the site's command was asked; it answers with ``prepared``.
    """
    asked = []
    with frames.listen(folder / "site.sock") as listener:

        def desk() -> None:
            with suppress(OSError):
                line, _ = listener.accept()
                asked.append(frames.receive(line, 100)[1])
                frames.send(line, {}, b"prepared")

        thread = threading.Thread(target=desk)
        thread.start()
        command = [str(engine / "python"), "-c", CLIENT_APP, "--insecure", "--token", "token", str(app)]
        surroundings = environment(engine, folder / "flwr", {SITE_SOCKET: str(folder / "site.sock")})
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120, check=False)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    (said,) = re.findall("^pushed: (.*)$", done.stdout, re.MULTILINE) or [done.stdout + done.stderr]
    return said, asked


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """An app by the name of ours, with code of its own."""
    app = Path(shutil.copytree(APP, tmp_path / "foreign"))
    (app / "fedsca_app.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit\n")
    return app


def test_a_run_of_this_packages_app_reaches_the_sites_command(engine: Path, tmp_path: Path) -> None:
    assert client_app(engine, tmp_path, APP) == ("{'payload': b'prepared'}", [b"terms"])


def test_a_hospital_neither_runs_nor_unpacks_code_that_is_not_its_own(
    engine: Path, foreign: Path, tmp_path: Path
) -> None:
    said, asked = client_app(engine, tmp_path, foreign)

    assert "ForeignBundleError" in said
    assert "install the same version of fedsca_pipeline at the coordinator and here" in said
    assert asked == []
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "flwr").rglob("fedsca_app*"))
