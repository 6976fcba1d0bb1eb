"""What the checks see: the data of the session that runs, in a process that had others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SESSIONS = """
import json, sys
from pathlib import Path
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

project, root = Path(sys.argv[1]), Path(sys.argv[2])
bootstrap_project(project)

def sites(data_root, env):
    with KedroSession.create(project, env=env, runtime_params={"data_root": str(data_root)}) as session:
        # As session.run does it.
        pipelines.set_requested(["__default__"])
        session.load_context()
        return sorted(node.name for node in pipelines["__default__"].nodes if node.name.endswith("prepare"))

def add(site):
    (root / "01_raw" / site / "images").mkdir(parents=True)

seen = []
add("north")
seen.append(sites(root, "smoke"))
add("south")
seen.append(sites(root, "smoke"))
seen.append(sites(root / "flower", "flower"))
seen.append(sites(root, "nuclei"))
seen.append(sites(root / "other", "smoke"))
print(json.dumps(seen))
"""


def test_every_session_of_a_process_gets_the_sites_of_its_own_data_root_as_they_are_then(
    project: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS, str(project), str(tmp_path)],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )

    north, both, deployed, again, demonstration = json.loads(done.stdout.splitlines()[-1])
    assert north == ["preprocessing.north.prepare"]
    assert both == again == ["preprocessing.north.prepare", "preprocessing.south.prepare"]
    assert deployed == []
    assert "preprocessing.harbour_ct.prepare" in demonstration
    assert len(demonstration) == 4
