"""Commands killed again and again at moments drawn over their whole length end as unbroken ones do."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 15


@dataclass(frozen=True)
class Command:
    """What is typed, and what of its outcome must be the same to the bit."""

    pipeline: str
    params: str
    outcome: Callable[[Any], Mapping[str, Any]]
    env: str = "smoke"

    def start(self, place: Any) -> subprocess.Popen[str]:
        return place.start(self.pipeline, self.params, env=self.env)


def models_and_scores(place: Any) -> dict[str, str]:
    files = place.contents("06_models", "07_model_output/test_scores")
    return {name: digest for name, digest in files.items() if name.endswith((".safetensors", ".csv"))}


def imported(place: Any) -> dict[str, str]:
    return place.contents("01_raw")


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


@pytest.fixture(params=["federated_training", "processes", "comparison", "import_sites"])
def command(request: pytest.FixtureRequest, photographs: Path) -> Command:
    return {
        "federated_training": Command("federated_training", "federation.rounds=4", models_and_scores),
        "processes": Command("federated_training", "federation.rounds=4,federation.fleet=processes", models_and_scores),
        "comparison": Command("comparison", "", cells, env="comparison_smoke"),
        "import_sites": Command("import_sites", f"importer=polyps,source={photographs}", imported),
    }[request.param]


def test_a_command_killed_at_random_moments_ends_as_an_unbroken_one(command: Command, new_workplace) -> None:
    unbroken = new_workplace()
    begun = time.monotonic()
    process = command.start(unbroken)
    said = process.communicate()
    length = time.monotonic() - begun
    assert process.returncode == 0, said
    expected = command.outcome(unbroken)
    assert expected
    chance, kills, place = random.Random(5), 0, new_workplace()

    while True:
        process = command.start(place)
        if kills < KILLS:
            try:
                said = process.communicate(timeout=chance.uniform(0.0, length))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
        else:
            said = process.communicate()
        assert process.returncode == 0, said
        assert command.outcome(place) == expected
        assert place.partial_files() == []
        if kills == KILLS:
            break
        place = new_workplace()
