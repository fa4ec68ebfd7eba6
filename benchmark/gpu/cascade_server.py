"""Decode iterations over shared prefixes on real servers: benchmark/serving/cascade.py's table."""

from __future__ import annotations

import json
from typing import Any

from benchmark.gpu.cascade import output
from benchmark.gpu.serving import write_model
from benchmark.gpu.setting import Setting

MODULE = "benchmark.serving.cascade"
#: Batches and shared tokens that the anchors speak of.
LARGE = ("--rows", "8", "32", "128", "--shared", "512", "2048", "8192", "32768", "--own", "256")
SMALL = ("--rows", "4", "--shared", "300", "--own", "8", "--turns", "1")
TIMEOUT_S = 560.0


def measure(setting: Setting) -> dict[str, Any]:
    """Its rows. Raises NotHereError with the script's last line if it fails."""
    model = write_model(setting.folder / "cascade_model", setting.is_small)
    name = setting.folder / "cascade_server_rows"
    arguments = ["--model", str(model), "--dummy", "--out", str(name)]
    arguments += SMALL if setting.is_small else LARGE
    if setting.on_gpu:
        arguments += ["--device", "cuda", "--dtype", "bfloat16"]
    output(arguments, MODULE, TIMEOUT_S)
    return {"arguments": arguments, "rows": json.loads(name.with_suffix(".json").read_text())}
