"""Commands killed again and again at moments drawn over their whole length end as unbroken ones do."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * 3600)]

KILLS = 15
SITE = "harbour_ct"


@dataclass(frozen=True)
class Command:
    """What is typed, in which place, and what of its outcome must be the same to the bit."""

    pipeline: str
    params: str
    outcome: Callable[[Any], Mapping[str, Any]]
    place: Callable[[], Any]
    env: str = "smoke"
    done_already: str | None = None
    """How it refuses to do again what it had just done when it was killed."""


def models_and_scores(place: Any) -> dict[str, str]:
    files = place.contents("06_models", "07_model_output/test_scores")
    return {name: digest for name, digest in files.items() if name.endswith((".safetensors", ".csv"))}


def cells(place: Any) -> dict[str, Any]:
    """Return the results of a comparison's cells but for what they took in time, memory and bytes."""
    found = {}
    for path in sorted((place.data / "07_model_output" / "comparison" / "cells").glob("*.json")):
        result = json.loads(path.read_text())
        found[path.stem] = {
            key: value for key, value in result.items() if key not in ("seconds", "peak_memory", "traffic")
        }
        # A message tells the seconds it took, and may be longer by some.
        found[path.stem]["rounds"] = [{**record, "bytes": None} for record in result["rounds"]]
    return found


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A published data set large enough to be killed while it is imported."""
    folder = tmp_path / "source" / "Kvasir-SEG"
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(60):
        mask = np.zeros((480, 640), np.uint8)
        mask[40:120, 60 : 100 + number] = 255
        pixels = generator.integers(0, 255, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"p{number}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"p{number}.jpg")
    return folder.parent


@pytest.fixture
def training(new_workplace) -> Command:
    return Command("federated_training", "federation.rounds=4", models_and_scores, new_workplace)


@pytest.fixture
def processes(new_workplace) -> Command:
    params = "federation.rounds=4,federation.fleet=processes"
    return Command("federated_training", params, models_and_scores, new_workplace)


@pytest.fixture
def comparison(new_workplace) -> Command:
    return Command("comparison", "", cells, new_workplace, env="comparison_smoke")


@pytest.fixture
def import_sites(new_workplace, photographs: Path) -> Command:
    return Command(
        "import_sites",
        f"importer=polyps,source={photographs}",
        lambda place: place.contents("01_raw", "02_intermediate"),
        new_workplace,
        done_already="is there already",
    )


@pytest.fixture
def predict(finished, tmp_path: Path) -> Command:
    for number in range(20):
        shutil.copytree(finished.raw / SITE / "images", tmp_path / "scans" / str(number))
    folders = iter(range(1000))
    return Command(
        "predict",
        f"predict.model={SITE},predict.source={tmp_path / 'scans'}",
        lambda place: place.contents("07_model_output/predicted"),
        lambda: finished.moved(tmp_path / f"place{next(folders)}"),
    )


@pytest.fixture(params=["training", "processes", "comparison", "import_sites", "predict"])
def command(request: pytest.FixtureRequest) -> Command:
    return request.getfixturevalue(request.param)


def test_a_command_killed_at_random_moments_ends_as_an_unbroken_one(command: Command) -> None:
    def start(place: Any, moment: float) -> Any:
        process = place.start(command.pipeline, command.params, env=command.env)
        return place.signalled(process, lambda: time.monotonic() > moment, signal.SIGKILL)

    unbroken, begun = command.place(), time.monotonic()
    done = start(unbroken, math.inf)
    length = time.monotonic() - begun
    assert done.code == 0, done.output
    expected = command.outcome(unbroken)
    assert expected
    chance, kills, place = random.Random(5), 0, command.place()

    while True:
        done = start(place, time.monotonic() + (chance.uniform(0.0, length) if kills < KILLS else math.inf))
        if done.code == -signal.SIGKILL:
            kills += 1
            continue
        assert done.code == 0 or (command.done_already and command.done_already in done.output), done.output
        assert command.outcome(place) == expected
        assert place.partial_files() == []
        if kills == KILLS:
            break
        place = command.place()
