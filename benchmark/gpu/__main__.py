"""Checks what this project does on a GPU, within a time; scripts/gpu_check sets it up.

    scripts/gpu_check --within 15m --out gpu_check       as much as there is time for
    scripts/gpu_check --within 15m --out gpu_check       again: goes on with what is not done
    scripts/gpu_check --steps copies --out gpu_check     these alone
    scripts/gpu_check --rehearse --out rehearsal         on a CPU, small: does it run?

Steps come in the order of their worth: what torch and Triton alone can tell, whether it serves, how
fast it is. Each is a process of its own with a limit; the next comes whatever became of it. Each
writes OUT/STEP.json as it goes and its output to OUT/STEP.log. OUT/check.json has all of them, with
the logs of those that failed, and OUT/report.md the tables: these two are what to bring home. A
later run with the same OUT goes on: first with what was never tried, then with what failed. What
ran out of time has twice as long then.

"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmark.gpu import record
from benchmark.gpu.plan import GROUPS, NAMES, STEPS, Step, next_step, seconds_of
from benchmark.gpu.report import report
from benchmark.gpu.run import run_step
from benchmark.gpu.setting import NotHereError, device_name


def say(text: str) -> None:
    sys.stderr.write(f"[gpu_check] {text}\n")
    sys.stderr.flush()


def seconds(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write for example 15m") from None


def choose_device(name: str, *, is_small: bool) -> torch.device:
    """Raises NotHereError if there is no such device, or a CPU is asked for full-size work."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cuda" and not has_cuda:
        raise NotHereError("torch sees no CUDA device here; use --rehearse to try it on a CPU.")
    if name == "cpu" and not is_small:
        raise NotHereError(
            "There is no GPU here, and the full sizes would take a CPU hours; add --rehearse to "
            "see whether everything runs."
        )
    return torch.device(name)


def is_of_this(document: record.Document, device: str, *, is_small: bool) -> bool:
    """Whether a step was measured on this device, at this size."""
    return document["device"] in ("", device) and document["is_small"] is is_small


def run_all(
    steps: Sequence[Step], folder: Path, device: torch.device, within_s: float,
    *, is_small: bool, again: bool,
) -> list[str]:  # fmt: skip
    """The names of the steps that this run has tried."""
    tried: list[str] = []
    ends_s = time.monotonic() + within_s
    name = device_name(device)
    record.restore(folder, NAMES)
    while True:
        found = record.read_all(folder, NAMES)
        states = {
            step: document["state"]
            for step, document in found.items()
            if is_of_this(document, name, is_small=is_small) and not (again and step not in tried)
        }
        left_s = ends_s - time.monotonic()
        step = next_step(states, tried, left_s, steps, is_small=is_small)
        if step is None:
            return tried
        tried.append(step.name)
        was_late = found.get(step.name, {}).get("state") == record.LATE
        limit_s = (2 if was_late else 1) * step.limit(is_small=is_small)
        limit_s = min(limit_s, max(left_s, 1.0))
        began_s = time.monotonic()
        state = run_step(step, folder, device.type, limit_s, is_small=is_small)
        document = record.gather(folder, NAMES).get(step.name, {})
        why = f": {document['reason']}" if "reason" in document else ""
        say(f"{step.name}: {state} after {time.monotonic() - began_s:.0f} s{why}")


def parser() -> argparse.ArgumentParser:
    about = [f"  {step.name:15} {step.group:8} {step.limit_s:4.0f} s  {step.tells}"
             for step in STEPS]  # fmt: skip
    result = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="\n".join([__doc__ or "", *about]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--within", type=seconds, default="15m", metavar="TIME",
        help="no step is begun that this leaves no time for (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("gpu_check"), help="folder (default: %(default)s)")
    add("--steps", nargs="+", choices=(*GROUPS, *NAMES), metavar="STEP",
        help="steps, or alone, serves, figures for all of a kind (default: all)")  # fmt: skip
    add("--rehearse", action="store_true", help="sizes for a test; the only ones for a CPU")
    add("--again", action="store_true", help="measure what is done already, too")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        device = choose_device(options.device, is_small=options.rehearse)
    except NotHereError as error:
        say(f"error: {error}")
        return 1
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = options.steps or GROUPS
    steps = [step for step in STEPS if step.name in wanted or step.group in wanted]
    os.environ["PYTHONWARNINGS"] = os.environ.get("PYTHONWARNINGS", "ignore")
    run_all(steps, folder, device, options.within, is_small=options.rehearse, again=options.again)
    found = record.gather(folder, NAMES)
    text = report(found)
    (folder / "report.md").write_text(text)
    sys.stdout.write(text)
    states = {step.name: found.get(step.name, {}).get("state", "not tried") for step in steps}
    failed = [name for name, state in states.items() if state in (record.FAILED, record.LATE)]
    left = [name for name, state in states.items() if state in ("not tried", record.NOT_HERE)]
    if failed:
        say(f"error: {', '.join(failed)} failed: their output is in {folder}.")
    if failed or left:
        say(f"not done: {', '.join([*left, *failed])}; running this again goes on there.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
