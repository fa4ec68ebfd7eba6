"""Decode attention over shared prefixes: the table of benchmark/micro/cascade_attention.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmark.command_line import ROOT
from benchmark.gpu.setting import NotHereError, Setting

MODULE = "benchmark.micro.cascade_attention"
#: Llama-3.1-8B's attention; batches and shared tokens around the expected break-even.
LARGE = ("--rows", "8", "32", "128", "--shared", "256", "1024", "4096", "16384", "--own", "256")
SMALL = ("--rows", "4", "--shared", "64", "--own", "16", "--turns", "2", "--threads", "1")
LLAMA = ("--shape", "32", "8", "128", "--dtype", "bfloat16", "--turns", "7")
TIMEOUT_S = 180.0


def measure(setting: Setting) -> dict[str, Any]:
    """Its rows. Raises NotHereError where it can't run on this device."""
    arguments = list(SMALL if setting.is_small else (*LARGE, *LLAMA))
    if setting.on_gpu:
        if "--device" not in output(["--help"]):
            raise NotHereError("cascade attention has no runner for GPUs yet")
        arguments += ["--device", "cuda"]
    rows = setting.folder / "cascade_rows.json"
    output([*arguments, "--json", str(rows)])
    found = json.loads(rows.read_text())
    rows.unlink()
    return {"arguments": arguments, "rows": found}


def output(arguments: list[str], module: str = MODULE, timeout_s: float = TIMEOUT_S) -> str:
    """What a benchmark prints. Raises NotHereError with its last line if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotHereError(f"{module} failed: {last}")
    return result.stdout
