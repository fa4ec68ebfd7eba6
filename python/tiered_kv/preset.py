"""Makes a preset of the cost model out of what scripts/gpu_check measured on a device.

    scripts/gpu_check --within 15m --out gpu_check         on the machine with the device
    python -m tiered_kv.preset gpu_check                   shows the preset beside what was assumed
    python -m tiered_kv.preset gpu_check --write           puts it into core/device_spec.py

Fitted are: the host link's bandwidth and latency, to our own copies to the device; the share of the
peak that prefills reach, to first tokens of prompts that plain SGLang had never seen; the share of
the memory bandwidth that decoding reaches, to its time per output token. Whether decodes are mixed
into prefills by default is what the step mixing found to be better. Data sheet peaks stay, and so
does the fixed part of an iteration, which one batch size cannot tell from the rest. What a step did
not measure stays as it was, and the preset's source says so.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from tiered_kv.core import device_spec
from tiered_kv.core.device_spec import DeviceSpec, find_device, preset_for
from tiered_kv.core.errors import ConfigError, TieredKVError
from tiered_kv.core.model_spec import ModelSpec, find_model
from tiered_kv.scheduler.cost_model import CostModel

SCHEMA = 2
#: Steps of gpu_check that have first tokens and output tokens of plain SGLang.
SERVED = ("ttft_plain", "ttft_more")
#: Our ways across the bus, of which a server takes the faster one.
WAYS = ("ours, dma", "ours, kernel")
#: Prompts may take so much longer to their first tokens where decodes are mixed in.
MIXED_TTFT_MAX = 1.1
MODEL = "Llama-3.1-8B"
"""What gpu_check's server is given, with two bytes per parameter and element of KV."""


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = fixed_s + slope * x."""

    fixed_s: float
    slope: float


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Least squares of (x, seconds) over relative errors; neither parameter below zero.

    Raises ConfigError unless there are two different x, all numbers being positive.
    """
    if len({x for x, _ in points}) < 2 or min(min(point) for point in points) <= 0:
        raise ConfigError(
            "A line needs positive times at two sizes or more; run this part of gpu_check again."
        )
    n = sum(1 / y**2 for _, y in points)
    sx, sxx = (sum(x**k / y**2 for x, y in points) for k in (1, 2))
    sy, sxy = sum(1 / y for _, y in points), sum(x / y for x, y in points)
    determinant = n * sxx - sx * sx
    fixed_s = (sy * sxx - sxy * sx) / determinant
    slope = (n * sxy - sx * sy) / determinant
    if fixed_s < 0:
        return Line(0.0, sxy / sxx)
    if slope <= 0:
        raise ConfigError(
            "Larger sizes were measured to take no longer: the machine was busy with something "
            "else; run this part of gpu_check again."
        )
    return Line(fixed_s, slope)


def link_of(copies: Mapping[str, Any]) -> tuple[float, float]:
    """(bytes/s, seconds before the first byte) of our copies to the device.

    By the way that is faster for large ones. Raises ConfigError.
    """
    lines = []
    for way in WAYS:
        points = [
            (row["n_bytes"], row["seconds"])
            for row in copies["rows"]
            if row["mover"] == way and row["direction"] == "to device" and row["seconds"]
        ]
        if points:
            lines.append(fit_line(points))
    if not lines:
        raise ConfigError("No copies of ours were measured; run the step copies again.")
    line = min(lines, key=lambda line: line.slope)
    return 1 / line.slope, line.fixed_s


def ideal(device: DeviceSpec, model: ModelSpec) -> CostModel:
    """The model at the peaks of the data sheet, nothing fixed."""
    peak = replace(device, compute_efficiency=1.0, bandwidth_efficiency=1.0, iteration_floor_s=0.0)
    return CostModel(model, peak, {})


def compute_efficiency(serving: Mapping[str, Any], device: DeviceSpec, model: ModelSpec) -> float:
    """Share of the peak FLOP/s in prefills of plain SGLang.

    What HTTP and detokenising add to a first token is the line's fixed part, and left out. Raises
    ConfigError for times that no device of these peaks can have reached.
    """
    cost = ideal(device, model)
    points = [
        (cost.prefill_s(sample["tokens"]), sample["ttft_s"])
        for sample in serving["samples"]
        if sample["system"] == "plain" and sample["state"] == "new" and not sample["cached_tokens"]
    ]
    return checked_share("prefills", 1 / fit_line(points).slope, device)


def bandwidth_efficiency(serving: Mapping[str, Any], device: DeviceSpec, model: ModelSpec) -> float:
    """Share of the peak memory bandwidth in decoding by plain SGLang, less the iteration's floor.

    Raises ConfigError as `compute_efficiency`.
    """
    found = serving["decoding"]["plain"]
    n, context = int(found["n_decodes"]), int(found["context_tokens"])
    ideal_s = ideal(device, model).iteration_s((), n * context, n)
    busy_s = found["tpot_s"] - device.iteration_floor_s
    if busy_s <= 0:
        raise ConfigError(
            f"A token took {1000 * found['tpot_s']:.2f} ms, less than the fixed part assumed of "
            f"every iteration; lower iteration_floor_s of {device.name} first."
        )
    return checked_share("decoding", ideal_s / busy_s, device)


def checked_share(what: str, share: float, device: DeviceSpec) -> float:
    if not 0 < share <= 1:
        raise ConfigError(
            f"{what.capitalize()} reached {share:.2f} of the peak of {device.name}, which cannot "
            "be: name the device that was measured with --base."
        )
    return share


def measured_preset(parts: Mapping[str, Mapping[str, Any]], base: DeviceSpec) -> DeviceSpec:
    """`base` with what the parts' results say; parts that are missing change nothing.

    Raises ConfigError for results that cannot be of this device.
    """
    model = find_model(MODEL)
    changes: dict[str, Any] = {}
    kept = ["iteration floor"]
    if "copies" in parts:
        bandwidth, latency_s = link_of(parts["copies"])
        changes["host_link_bandwidth"] = rounded(bandwidth)
        changes["host_link_latency_s"] = rounded(latency_s)
    else:
        kept.append("host link")
    serving = served_of(parts)
    if any(sample["system"] == "plain" for sample in serving.get("samples", ())):
        changes["compute_efficiency"] = rounded(compute_efficiency(serving, base, model))
    else:
        kept.append("compute efficiency")
    if "plain" in serving.get("decoding", {}):
        changes["bandwidth_efficiency"] = rounded(bandwidth_efficiency(serving, base, model))
    else:
        kept.append("bandwidth efficiency")
    if "mixing" in parts:
        changes |= {"mixes_decodes": mixing_gains(parts["mixing"]), "is_mixing_measured": True}
    if not changes:
        raise ConfigError(
            "Neither copies nor ttft_plain was measured; run these steps of gpu_check first."
        )
    peaks = base.source.split(";")[0]
    source = f"{peaks}; the rest by scripts/gpu_check with {MODEL}, but {', '.join(kept)} assumed"
    return replace(base, **changes, source=source)


def mixing_gains(mixing: Mapping[str, Any]) -> bool:
    """Whether decodes in the pass of a prefill made tokens come sooner, and prompts hardly later.

    Raises ConfigError without both.
    """
    found: dict[str, dict[str, float]] = {}
    for mode in ("mixed", "in turns"):
        rows = [row for row in mixing["rows"] if row["mode"] == mode]
        if not rows:
            raise ConfigError("Only one way was measured; run the step mixing again.")
        found[mode] = {name: median(row[name] for row in rows) for name in ("tpot_s", "ttft_s")}
    mixed, apart = found["mixed"], found["in turns"]
    return mixed["tpot_s"] < apart["tpot_s"] and mixed["ttft_s"] < MIXED_TTFT_MAX * apart["ttft_s"]


def served_of(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of all steps that have some, and the decoding of the first that has it."""
    steps = [parts[name] for name in SERVED if name in parts]
    decoding = [step["decoding"] for step in steps if step.get("decoding")]
    return {
        "samples": [sample for step in steps for sample in step["samples"]],
        "decoding": decoding[0] if decoding else {},
    }


def rounded(value: float) -> float:
    """Three digits: what a repetition gives again."""
    return float(f"{value:.3g}")


# -- files -----------------------------------------------------------------------------------


def read_parts(folder: Path) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """The device's name and the result of each step that is done. Raises ConfigError."""
    parts: dict[str, Mapping[str, Any]] = {}
    devices = set()
    for path in sorted(folder.glob("*.json")):
        if path.name == "check.json":  # all of them again
            continue
        try:
            document = json.loads(path.read_text())
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']}, not {SCHEMA}")
            part, device, is_small = (document[key] for key in ("step", "device", "is_small"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no file of gpu_check ({error}); name the folder that it wrote."
            ) from None
        if is_small:
            raise ConfigError(
                f"{path} was measured with --rehearse, whose figures say nothing; run gpu_check "
                "without it."
            )
        if document["state"] != "done":
            continue
        devices.add(device)
        parts[part] = document["result"]
    if not devices:
        raise ConfigError(f"{folder} holds no files of gpu_check; run scripts/gpu_check first.")
    if len(devices) > 1:
        raise ConfigError(
            f"{folder} holds figures of {' and '.join(sorted(devices))}; keep one device's."
        )
    return devices.pop(), parts


def base_for(device_name: str) -> DeviceSpec:
    """The preset of the device that torch calls this. Raises ConfigError if there is none."""
    preset = preset_for(device_name)
    if preset is None:
        raise ConfigError(
            f"There is no preset for {device_name}; name the one whose peaks it has with --base."
        )
    return preset


def source_of(spec: DeviceSpec) -> str:
    """The preset as it stands in core/device_spec.py, indented by four."""
    lines = ["    DeviceSpec("]
    for field in fields(spec):
        value = getattr(spec, field.name)
        if value == field.default:
            continue
        text = json.dumps(value) if isinstance(value, str) else f"{value!r}"
        if field.name == "memory_bytes":
            text = f"{value:_}"
        if isinstance(value, str) and len(text) > 80:
            head, tail = (
                value[: value.rindex(" ", 0, 75) + 1],
                value[value.rindex(" ", 0, 75) + 1 :],
            )
            text = f"{json.dumps(head)}\n        {json.dumps(tail)}"
        lines.append(f"        {field.name}={text},")
    return "\n".join([*lines, "    ),"])


def with_preset(source: str, spec: DeviceSpec) -> str:
    """The text of core/device_spec.py with this preset in place of the one of its name.

    Raises ConfigError if there is none.
    """
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DeviceSpec"):
            continue
        names = [k.value.value for k in node.keywords
                 if k.arg == "name" and isinstance(k.value, ast.Constant)]  # fmt: skip
        if names == [spec.name]:
            lines = source.splitlines()
            lines[node.lineno - 1 : node.end_lineno] = source_of(spec).splitlines()
            return "\n".join(lines) + "\n"
    raise ConfigError(f"core/device_spec.py has no preset {spec.name}; add one by hand first.")


def comparison(base: DeviceSpec, found: DeviceSpec) -> str:
    """Both presets, field by field."""
    rows = [f"{'':22} {'assumed':>12} {'measured':>12}"]
    for field in fields(base):
        before, after = getattr(base, field.name), getattr(found, field.name)
        if isinstance(before, float) and before != after:
            rows.append(f"{field.name:22} {before:12.4g} {after:12.4g}")
    return "\n".join([f"{found.name}: {found.source}", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tiered_kv.preset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="that scripts/gpu_check wrote")
    parser.add_argument("--base", metavar="PRESET", help="preset to start from (default: by name)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the preset there")
    parser.add_argument(
        "--write", action="store_true", help="replace the preset in this installation's source"
    )
    chosen = parser.parse_args(arguments)
    try:
        device_name, parts = read_parts(chosen.folder)
        base = find_device(chosen.base) if chosen.base else base_for(device_name)
        found = measured_preset(parts, base)
        if chosen.write:
            path = Path(device_spec.__file__)
            path.write_text(with_preset(path.read_text(), found))
    except TieredKVError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error.filename} can't be written ({error.strerror}).\n")
        return 2
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    sys.stdout.write(comparison(base, found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
