"""The whole check, rehearsed on a CPU from the bundle's three parts, beside torch and Triton alone.

It takes the bundle that scripts/offline_bundle makes (downloads, once, and minutes of compressing)
and an environment with torch and Triton of the pin and nothing that they do not require themselves
(three gigabytes). Both may be named instead: TIERED_KV_TEST_BUNDLE, a folder, and
TIERED_KV_TEST_PYTHON, the interpreter of such an environment, of the version that the bundle is
for. With TIERED_KV_TEST_OUT the check's files stay in a folder, and an earlier one there goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmark.gpu.plan import ALONE, STEPS
from support.first_part import HOST, others

ROOT = Path(__file__).parents[2]
PART_BYTES_MAX, PARTS_MAX = 60 << 20, 3
SMALL_FILES = ("SHA256SUMS", "bundle.json", "install")
PINNED = ("torch==2.11.0", "triton==3.6.0")
#: What torch and Triton may bring along, and what an environment has to begin with.
REQUIRED = rf"{HOST}|pip|wheel"

pytestmark = [pytest.mark.long, pytest.mark.server, pytest.mark.timeout(7200)]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("TIERED_KV_TEST_BUNDLE")
    if named:
        return Path(named)
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    run(sys.executable, ROOT / "scripts" / "offline_bundle", "--out", out, "--python-version",
        version)  # fmt: skip
    return out


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has torch and Triton."""
    named = os.environ.get("TIERED_KV_TEST_PYTHON")
    if named:
        return Path(named)
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", venv)
    run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", *PINNED)
    return venv / "bin" / "python"


def clean(environment: dict[str, str]) -> dict[str, str]:
    """Nothing of this process's packages."""
    left_out = ("PYTHONPATH", "TIERED_KV_PYTHON", "TIERED_KV_VENV", "VIRTUAL_ENV")
    return {name: value for name, value in environment.items() if name not in left_out}


def test_from_three_parts_beside_torch_and_triton_alone(
    bundle: Path, python: Path, tmp_path: Path
) -> None:
    environment = {**clean(dict(os.environ)), "CUDA_VISIBLE_DEVICES": ""}
    listed = (
        "import importlib.metadata as m; print(*(d.metadata['Name'] for d in m.distributions()))"
    )
    has = run(python, "-c", listed, env=environment, cwd=tmp_path).stdout.lower().split()
    assert others(has, REQUIRED) == []
    parts = sorted(path for path in bundle.iterdir() if path.name not in SMALL_FILES)
    assert 0 < len(parts) <= PARTS_MAX
    assert all(path.stat().st_size <= PART_BYTES_MAX for path in parts)

    folder, prefix = tmp_path / "there", tmp_path / "prefix"
    out = Path(os.environ.get("TIERED_KV_TEST_OUT", tmp_path / "out"))
    folder.mkdir()
    for name in (*SMALL_FILES, "first.tar.xz"):
        shutil.copyfile(bundle / name, folder / name)
    run(python, folder / "install", "--prefix", prefix, env=environment, cwd=tmp_path)
    rehearse = [prefix / "gpu_check", "--rehearse", "--within", "2h", "--out", out]
    run(*rehearse, "--steps", "alone", env=environment, cwd=tmp_path)
    states = states_in(out)
    assert {name: state for name, state in states.items() if state == "done"} == {
        step.name: "done" for step in STEPS if step.group == ALONE
    }

    for path in parts:
        shutil.copyfile(path, folder / path.name)
    run(python, folder / "install", "--prefix", prefix, env=environment, cwd=tmp_path)
    run(*rehearse, env=environment, cwd=tmp_path)
    states = states_in(out)
    # Nothing brings pytest.
    assert states.pop("gpu_tests") == "not here"
    assert states == {step.name: "done" for step in STEPS if step.name != "gpu_tests"}


def states_in(out: Path) -> dict[str, str]:
    together = json.loads((out / "check.json").read_text())
    return {name: document["state"] for name, document in together["steps"].items()}
