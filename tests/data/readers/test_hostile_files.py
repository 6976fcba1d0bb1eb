"""Whatever lies in a site folder: no crash, no hang, little memory, each file accounted for, nothing read elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

from fedsca_pipeline.data.site_folder.pairing import shown

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

GIB = 2**30
# Seconds of the processor for one file.
LONGEST = 10

# Python reads it at the start of the process that prepares, and of the one that decodes.
WATCH = """
import os, sys

log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, b"watched\\n")

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.fsdecode(arguments[0])
        if path.startswith(({outside!r}, "/dev/zero", "/etc/passwd")):
            os.write(log, os.fsencode(path) + b"\\n")

sys.addaudithook(watch)
"""


def check(folder: Path, count: int, seed: int) -> None:
    """Make hostile sites, prepare them in a process under watch, and look at what it found."""
    raw, outside, scratch = folder / "raw", folder / "outside", folder / "scratch"
    written = hostile.write_hostile_sites(raw, count, seed, outside)
    hostile.write_sound_site(raw / "sound")
    scratch.mkdir()
    (scratch / "sitecustomize.py").write_text(WATCH.format(outside=str(outside), log=str(folder / "reached")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(scratch), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, hostile.__file__, raw, scratch, outside], capture_output=True, text=True, env=environment
    )

    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout)
    for site, files in written.items():
        used, broken = found["sites"][site]["used"], found["sites"][site]["broken"]
        named = {entry["file"] for entry in broken}
        accounted = {*used, *named}
        assert [file for file in files if not accounted & {shown(name) for name in file.pair}] == []
        assert [file for file in files if file.hopeless and file.file in used] == []
        assert {f"images/sound_{number}.png" for number in range(6)} <= {*used, *named}
        assert all(entry["reason"] and entry["cure"] for entry in broken)
        assert [entry for entry in broken if not "".join(entry.values()).isprintable()] == []
    assert found["reached"] == []
    assert (folder / "reached").read_text().splitlines() == ["watched"] * 2
    assert max(seconds for _, seconds in found["slowest"]) <= LONGEST, found["slowest"]
    assert found["peak"] <= GIB, found["grown"]


def test_some_hundreds_of_hostile_files_harm_nobody(tmp_path: Path) -> None:
    check(tmp_path, 600, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_twenty_thousand_hostile_files_harm_nobody(tmp_path: Path) -> None:
    check(tmp_path, 20_000, seed=2)
