"""Sites behind a scripted link, a clock that only the fleet advances, and a site's YAML file with its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from PIL import Image

from fedsca_pipeline.flower.config import FlowerConfig
from fedsca_pipeline.flower.coordinator.fleet import FlowerFleet
from fedsca_pipeline.flower.coordinator.link import LinkLost, Node, Reply

SITES = ("a", "b", "c")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Pushed:
    """One message that was sent through the link."""

    id: str
    node: str
    task: Mapping[str, Any]
    payload: bytes
    at: float


@dataclass
class ScriptedSite:
    """Behaviour of one site: seconds until it answers, its answer, when it is disconnected, and when it restarts."""

    seconds: float = 1.0
    answer: Callable[[Pushed], Reply] | None = None
    away: Callable[[float], bool] = lambda now: False
    restarts: Callable[[float], str] = lambda now: ""


@dataclass
class FakeLink:
    clock: Clock
    sites: dict[str, ScriptedSite] = field(default_factory=lambda: {site: ScriptedSite() for site in SITES})
    pushed: list[Pushed] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    broken: Callable[[float], bool] = lambda now: False
    reconnected: int = 0

    def _check(self) -> None:
        if self.broken(self.clock.now):
            raise LinkLost("broken")

    def nodes(self) -> Mapping[str, Node]:
        self._check()
        now = self.clock.now
        return {name: Node(f"node-{name}", s.restarts(now)) for name, s in self.sites.items() if not s.away(now)}

    def push(self, node: str, task: Mapping[str, Any], payload: bytes, ttl: float) -> str | None:
        self._check()
        self.pushed.append(Pushed(f"m{len(self.pushed)}", node, dict(task), payload, self.clock.now))
        return self.pushed[-1].id

    def pull(self, ids: Sequence[str]) -> Sequence[Reply]:
        self._check()
        due = [message for message in self.pushed if message.id in ids and message.id not in self.answered]
        found = [reply for message in due if (reply := self._reply(message)) is not None]
        self.answered |= {reply.id for reply in found}
        return found

    def reconnect(self) -> None:
        self.reconnected += 1
        self._check()

    def _reply(self, message: Pushed) -> Reply | None:
        site = self.sites[message.task["site"]]
        if self.clock.now < message.at + site.seconds or site.away(self.clock.now):
            return None
        plain = Reply(message.id, message.node, f"{message.task['site']}{message.task['round']}".encode())
        return plain if site.answer is None else replace(site.answer(message), id=message.id)

    def sent(self, site: str, kind: str = "round") -> list[Pushed]:
        return [m for m in self.pushed if m.task["site"] == site and m.task["kind"] == kind]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def link(clock: Clock) -> FakeLink:
    return FakeLink(clock)


@pytest.fixture
def config(tmp_path: Path) -> FlowerConfig:
    return FlowerConfig(
        sites=list(SITES), authority=tmp_path / "ca.crt", home=tmp_path / "home", max_message=1, poll=1.0, retry=10.0
    )


@pytest.fixture
def fleet(link: FakeLink, config: FlowerConfig, clock: Clock) -> FlowerFleet:
    return FlowerFleet(link, config, clock=clock, sleep=clock.sleep)


@pytest.fixture
def exchange(fleet: FlowerFleet) -> Callable[..., Mapping[str, Any]]:
    """Runs one round with all sites; default: a deadline of 100 s, a quorum of 2 and infinite grace."""

    def run(round_: int = 1, **options: Any) -> Mapping[str, Any]:
        return fleet.exchange(
            round_, dict.fromkeys(SITES, b"payload"), **{"deadline": 100.0, "quorum": 2, "grace": math.inf, **options}
        )

    return run


@pytest.fixture
def scripted() -> type[ScriptedSite]:
    return ScriptedSite


@pytest.fixture
def reply() -> type[Reply]:
    return Reply


@pytest.fixture(scope="session")
def certificates() -> Mapping[str, bytes]:
    """The key of a site and the certificate of an authority, as ``deploy/make_authority.sh`` makes them."""
    key, name = ec.generate_private_key(ec.SECP384R1()), x509.Name([])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(1))
    return {
        "ca.crt": made.sign(key, SHA256()).public_bytes(Encoding.PEM),
        "a.key": key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    }


@pytest.fixture
def values(tmp_path: Path, certificates: Mapping[str, bytes]) -> dict[str, Any]:
    """Values of a site's YAML file, with data and certificates that exist."""
    draw = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index in range(8):
        Image.fromarray(draw.integers(0, 255, (24, 24), dtype=np.uint8)).save(tmp_path / f"data/images/{index}.png")
        mask = np.zeros((24, 24), np.uint8)
        mask[4 : 8 + index, 4:12] = 1
        Image.fromarray(mask).save(tmp_path / f"data/masks/{index}.png")
    for name, content in certificates.items():
        (tmp_path / name).write_bytes(content)
    return {
        "site": "a",
        "data": "data",
        "work": "work",
        "coordinator": "coordinator.example.org:8443",
        "certificates": {"authority": "ca.crt", "key": "a.key"},
    }


@pytest.fixture
def site_file(values, tmp_path: Path) -> Callable[..., Path]:
    """Writes a site's YAML file; keywords replace its values."""

    def write(**changed: Any) -> Path:
        path = tmp_path / "site.yml"
        path.write_text(yaml.safe_dump({**values, **changed}))
        return path

    return write
