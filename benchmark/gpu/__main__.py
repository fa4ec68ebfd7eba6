"""Checks what this project does on a GPU, in parts; scripts/gpu_check sets the environment up.

    scripts/gpu_check --out gpu_check                    everything, about eight minutes
    scripts/gpu_check --out gpu_check --parts transfers  one part; others are kept as they are
    scripts/gpu_check --out small --small                on a CPU: does it run?

Each part writes OUT/PART.json when it is done, and a part whose file is there is not measured
again (--again does), so an interrupted check goes on where it was. All that is there is printed in
the end.

  environment     versions, hardware, peaks of plain torch
  kernels         gather, scatter and conversion of pages: against references, and in bytes/s
  transfers       device to host and back: ours, HiCache's ways, memcpy; alone and beside decoding
  cascade         decode attention over shared prefixes
  cascade_server  the same on real servers in turn, CUDA graphs on; only if it is asked for
  serving         time to first token by tier on the real server: plain, HiCache, ours in turn

`python -m tiered_kv.preset OUT` makes a preset of the cost model out of the files.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmark.gpu.report import report
from benchmark.gpu.setting import NotHereError, Setting

SCHEMA = 1
DEFAULT_PARTS = ("environment", "kernels", "transfers", "cascade", "serving")
#: The last ones only if they are named: with them a check takes longer than it should.
PARTS = (*DEFAULT_PARTS, "cascade_server")


def run_part(part: str, setting: Setting) -> dict[str, Any]:
    """What the part's file holds. A part that can't run here says why; errors are raised."""
    start = time.monotonic()
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "part": part,
        "device": device_name(setting.device),
        "is_small": setting.is_small,
        "finished": "",
        "seconds": 0.0,
    }
    try:
        facts["result"] = importlib.import_module(f"benchmark.gpu.{part}").measure(setting)
    except NotHereError as missing:
        facts["reason"] = str(missing)
    facts["seconds"] = round(time.monotonic() - start, 1)
    facts["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return facts


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """In one step: a file that is there is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def read_part(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(document, dict) and document.get("schema") == SCHEMA
    return document if is_ours else None


def is_done(document: dict[str, Any] | None, setting: Setting) -> bool:
    """Whether a part was measured on this device, at this size, and had figures."""
    return (
        document is not None
        and "result" in document
        and document["device"] == device_name(setting.device)
        and document["is_small"] == setting.is_small
    )


def choose_device(name: str, *, is_small: bool) -> torch.device:
    """Raises NotHereError if there is no such device, or a CPU is asked for full-size work."""
    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    if name == "cuda" and not has_cuda:
        raise NotHereError("torch sees no CUDA device here; use --device cpu --small to try it.")
    if name == "cpu" and not is_small:
        raise NotHereError(
            "There is no GPU here, and the full sizes would take a CPU hours; add --small to see "
            "whether everything runs."
        )
    return torch.device(name)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--out", type=Path, default=Path("gpu_check"), help="folder (default: %(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS, metavar="PART",
        help=f"which (default: {', '.join(DEFAULT_PARTS)})")  # fmt: skip
    add("--small", action="store_true", help="sizes for a test; the only ones for a CPU")
    add("--again", action="store_true", help="measure parts that are there already, too")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: %(default)s")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        device = choose_device(options.device, is_small=options.small)
    except NotHereError as error:
        sys.stderr.write(f"[gpu_check] error: {error}\n")
        return 1
    folder = options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, options.small, folder)
    failed = []
    with tqdm([part for part in PARTS if part in options.parts], unit=" parts") as bar:
        for part in bar:
            bar.set_description(part)
            path = folder / f"{part}.json"
            if not options.again and is_done(read_part(path), setting):
                tqdm.write(f"[gpu_check] {part}: measured before, kept", file=sys.stderr)
                continue
            try:
                facts = run_part(part, setting)
            except Exception as error:  # the other parts are worth having
                failed.append(part)
                tqdm.write(f"[gpu_check] {part} failed: {error!r}", file=sys.stderr)
                continue
            write_json(path, facts)
            tqdm.write(f"[gpu_check] {part}: {facts['seconds']} s", file=sys.stderr)
    found = {part: read_part(folder / f"{part}.json") for part in PARTS}
    text = report({part: document for part, document in found.items() if document})
    (folder / "report.md").write_text(text)
    sys.stdout.write(text)
    if failed:
        sys.stderr.write(
            f"[gpu_check] error: {', '.join(failed)} failed, see above; running this again "
            "measures only what is missing.\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
