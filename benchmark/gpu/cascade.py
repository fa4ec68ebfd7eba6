"""Decode attention over shared prefixes: of one layer, and of real servers in turn.

The tables of benchmark/micro/cascade_attention.py and benchmark/serving/cascade.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.command_line import ROOT
from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting
from benchmark.gpu.systems import write_model

KERNEL, SERVER = "benchmark.micro.cascade_attention", "benchmark.serving.cascade"
#: Llama-3.1-8B's attention.
LLAMA = ("--shape", "32", "8", "128", "--dtype", "bfloat16", "--turns", "7", "--device", "cuda")
#: Batches and shared tokens: what the targets speak of first, then around the expected break-even.
CASES = (((64,), (8192,)), ((16,), (1024,)), ((8, 32, 128), (256, 1024, 4096, 16384)))
SERVER_CASES = (((64,), (8192,)), ((16,), (1024,)))


def kernel(setting: Setting, notes: Record) -> dict[str, Any]:
    """Rows of one layer's attention; case by case, so that what comes first is kept."""
    rows: list[dict[str, Any]] = []
    out = setting.folder / "cascade_rows.json"
    small = ("--own", "16", "--turns", "2", "--threads", "1")
    for n_rows, shared in (((4,), (64,)),) if setting.is_small else CASES:
        own = small if setting.is_small else ("--own", "256", *LLAMA)
        out.unlink(missing_ok=True)
        try:
            run(KERNEL, [*sizes(n_rows, shared), *own, "--json", str(out)])
        finally:
            rows += rows_in(out)
            notes.so_far({"rows": rows})
    return {"rows": rows}


def server(setting: Setting, notes: Record) -> dict[str, Any]:
    """Rows of whole iterations of three servers that stay up together."""
    model = write_model(setting.folder / "cascade_model", setting.is_small)
    name = setting.folder / "cascade_server_rows"
    out = name.with_suffix(".json")
    out.unlink(missing_ok=True)
    notes.so_far({"rows": []})
    arguments = ["--model", str(model), "--dummy", "--out", str(name)]
    arguments += ["--logs", str(setting.folder / "cascade_server_server_")]
    if setting.is_small:
        arguments += [*sizes((4,), (300,)), "--own", "8", "--turns", "1"]
    else:
        pairs = [f"{rows[0]}x{shared[0]}" for rows, shared in SERVER_CASES]
        arguments += ["--cases", *pairs, "--own", "256"]
    if setting.on_gpu:
        arguments += ["--device", "cuda", "--dtype", "bfloat16"]
    trouble = {}
    try:
        run(SERVER, arguments)
    except RuntimeError as error:
        # All rows are there: it was the servers' end that went wrong.
        if len(rows_in(out)) < (1 if setting.is_small else len(SERVER_CASES)):
            raise
        trouble = {"one of the servers": [str(error)]}
    finally:
        notes.so_far({"rows": rows_in(out)})
    return {"rows": rows_in(out), "trouble": trouble}


def rows_in(path: Path) -> list[dict[str, Any]]:
    """What a benchmark has written by now: it may have been stopped."""
    return json.loads(path.read_text()) if path.exists() else []


def sizes(rows: Sequence[int], shared: Sequence[int]) -> list[str]:
    return ["--rows", *map(str, rows), "--shared", *map(str, shared)]


def run(module: str, arguments: Sequence[str]) -> None:
    """A benchmark, with its output in this step's log. Raises RuntimeError if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        cwd=Path.cwd(),
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{module} ended with code {result.returncode}, see above")
