"""File systems that really are full or read-only when a server starts, and the tool on them.

States that a test can only pretend are in test/unit/tiers/disk/test_states.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "disk_state_fs.py"
NO_MOUNT = 3


@pytest.mark.parametrize(
    "scenario", ["full", "full-after-a-crash", "read-only", "read-only-after-a-crash"]
)
def test_pages_are_read_until_they_can_be_written(tmp_path: Path, scenario: str) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1)")
    prefix = ["unshare", "--mount", "--map-root-user"]
    run = subprocess.run(
        [*prefix, sys.executable, str(PROGRAM), str(tmp_path / "fs"), scenario],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode == NO_MOUNT or "unshare: " in run.stderr:
        pytest.skip("no file system can be mounted here")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["inspect_status"] == 0, report["inspect_says"]
    assert report["inspect_shows_pages"], report["inspect_says"]
    assert report["degraded"]
    assert report["read"] == 20
    assert report["written"] == 0
    assert not report["degraded_after"]
    assert report["read_after"] == 20
    assert report["written_after"] == 5
    told = [line for line in run.stderr.splitlines() if "isk tier" in line]
    assert len(told) == 2, run.stderr
    assert "its 20 pages are read, and none are written" in told[0]
    assert ("free some space" if scenario.startswith("full") else "writable") in told[0]
    assert "is in use after" in told[1]
