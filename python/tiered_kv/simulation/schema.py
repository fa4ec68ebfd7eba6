"""The shape of result files, as JSON Schema, and reading and writing them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from tiered_kv.core.errors import ConfigError

VERSION = 1

_NUMBER = {"type": "number"}
_MAYBE = {"type": ["number", "null"]}
_DISTRIBUTION = {
    "type": "object",
    "required": ["n", "mean", "p50", "p90", "p99", "max", "cdf"],
    "properties": {
        "n": {"type": "integer"},
        **dict.fromkeys(("mean", "p50", "p90", "p99", "max"), _MAYBE),
        "cdf": {"type": "array", "items": _NUMBER, "description": "values at CDF_SHARES"},
    },
}
_CLASS = {
    "type": "object",
    "required": ["n_requests", "attainment", "ttft_attainment", "ttft_s", "mean_tbt_s"],
    "properties": {
        "n_requests": {"type": "integer"},
        "ttft_slo_s": _MAYBE,
        "tbt_slo_s": _MAYBE,
        "attainment": _NUMBER,
        "ttft_attainment": _NUMBER,
        "ttft_s": _DISTRIBUTION,
        "mean_tbt_s": _DISTRIBUTION,
        "p99_tbt_s": _DISTRIBUTION,
        "tbt_attainment": {**_NUMBER, "description": "of those answered"},
        "late_gap_share": {**_NUMBER, "description": "of times between tokens, over the objective"},
    },
}
_RUN = {
    "type": "object",
    "required": [
        "labels", "workload", "settings", "n_requests", "n_finished", "duration_s", "attainment",
        "goodput_rps", "throughput_rps", "classes", "ttft_s", "wait_s", "mean_tbt_s", "hits",
    ],
    "properties": {
        "labels": {"type": "object"},
        "workload": {
            "type": "object",
            "required": ["spec", "name", "block_tokens", "rate", "seed"],
        },
        "settings": {"type": "object", "required": ["model", "device", "policy", "eviction"]},
        "n_requests": {"type": "integer", "minimum": 0},
        "n_finished": {"type": "integer", "minimum": 0},
        "duration_s": {"type": "number", "description": "simulated seconds"},
        "wall_s": {"type": "number", "description": "seconds the simulation took"},
        "attainment": {**_MAYBE, "description": "share of requests that met their objectives"},
        "goodput_rps": {"type": "number", "description": "requests/s that met their objectives"},
        "throughput_rps": _NUMBER,
        "classes": {"type": "object", "additionalProperties": _CLASS},
        "ttft_s": _DISTRIBUTION,
        "wait_s": {**_DISTRIBUTION, "description": "arrival to first admission"},
        "mean_tbt_s": {**_DISTRIBUTION, "description": "over requests, of each one's mean"},
        "p99_tbt_s": {**_DISTRIBUTION, "description": "over requests, of each one's 99th"},
        "programs": {
            "type": "object",
            "description": "sessions of several calls, all answered",
            "properties": {
                "attainment": {**_MAYBE, "description": "of their own objective"},
                "completion_s": _DISTRIBUTION,
                "waited_s": _DISTRIBUTION,
            },
        },
        "hits": {
            "type": "object",
            "required": ["device", "host", "disk", "computed", "input"],
            "additionalProperties": {"type": "integer"},
        },
    },
}  # fmt: skip
RESULT_FILE: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Results of python -m tiered_kv.simulation",
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": VERSION},
        "capacity": {"type": "object", "description": "see capacity.py"},
        "runs": {"type": "array", "items": _RUN},
    },
}


def write_results(
    path: Path, runs: list[dict[str, Any]], capacity: dict[str, Any] | None = None
) -> None:
    """Write a result file; figures are rounded to six significant digits."""
    data: dict[str, Any] = {"version": VERSION, "runs": runs}
    if capacity is not None:
        data["capacity"] = capacity
    data = _rounded(data)
    jsonschema.validate(data, RESULT_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, separators=(",", ":")) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """A result file. Raises ConfigError with one sentence if it isn't one."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        jsonschema.validate(data, RESULT_FILE)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}); give the path of a result file."
        ) from None
    except (ValueError, jsonschema.ValidationError) as error:
        reason = error.message if isinstance(error, jsonschema.ValidationError) else str(error)
        raise ConfigError(
            f"{path} is no result file of this version ({reason}); make it again with run or sweep."
        ) from None
    return data


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
