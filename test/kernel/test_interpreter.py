"""Runs `interpreted.py`: Triton decides at import whether to interpret, once for a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent


def interpret(marks: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marks, HERE / "interpreted.py"],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_kernels_give_the_references_bytes() -> None:
    interpret("not long")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_kernels_give_the_references_bytes_in_many_more_shapes() -> None:
    interpret("long")
