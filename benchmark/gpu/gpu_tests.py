"""This project's own tests that need a GPU, where there is pytest."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from typing import Any

from benchmark.command_line import ROOT
from benchmark.gpu.record import Record
from benchmark.gpu.setting import NotHereError, Setting

TESTS = (
    "test/kernel/test_copies_gpu.py",
    "test/kernel/test_kernels_gpu.py",
    "test/kernel/test_flashinfer_cascade_gpu.py",
)
#: Any that this machine can run, for a rehearsal.
SMALL_TESTS = ("test/unit/tiers/test_cuda_streams.py",)


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """Counts by outcome, for each file. Raises NotHereError without pytest, and for failures."""
    if importlib.util.find_spec("pytest") is None:
        raise NotHereError("pytest is not installed")
    found: dict[str, Any] = {}
    failed = []
    for name in SMALL_TESTS if setting.is_small else TESTS:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
        command += ["--import-mode=importlib", "-m", "not long", str(ROOT / name)]
        if importlib.util.find_spec("pytest_timeout") is None:
            command += ["-o", "timeout=0"]
        result = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        print(result.stdout, flush=True)
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)
        found[name] = {"code": result.returncode, **{what: int(n) for n, what in counts}}
        notes.so_far(found)
        if result.returncode != 0:
            failed.append(name)
    if failed:
        raise RuntimeError(f"{', '.join(failed)} failed")
    return found
