"""What a step leaves behind: OUT/STEP.json while it runs and when it is over, and its output."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 2
DONE, RUNNING, FAILED, LATE, NOT_HERE = "done", "running", "failed", "out of time", "not here"
#: All steps in one file: what there is to bring home.
ALL_NAME = "check.json"
#: Of a log, in that file: the end of it, if it is longer.
LOG_BYTES_MAX = 1 << 19

Document = dict[str, Any]
"""What OUT/STEP.json holds: schema, step, device, is_small, state; result: of all that was
measured, or of what was until the step ended; reason: why it is not done; seconds; finished."""


@dataclass
class Record:
    """Writes a step's file at once, whenever there is something new."""

    path: Path
    step: str
    device: str
    is_small: bool

    def write(self, state: str, **more: Any) -> Document:
        document: Document = {
            "schema": SCHEMA,
            "step": self.step,
            "device": self.device,
            "is_small": self.is_small,
            "state": state,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **more,
        }
        write_json(self.path, document)
        return document

    def so_far(self, result: Mapping[str, Any]) -> None:
        """What would be lost if the step ended now."""
        self.write(RUNNING, result=result)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """In one step: a file that is there is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> Document | None:
    """What a file holds; None if it is none of ours."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(document, dict) and document.get("schema") == SCHEMA
    return document if is_ours else None


def read_all(folder: Path, names: Iterable[str]) -> dict[str, Document]:
    """What is there of these steps, by name."""
    found = {name: read(folder / f"{name}.json") for name in names}
    return {name: document for name, document in found.items() if document is not None}


def restore(folder: Path, names: Iterable[str]) -> None:
    """Steps whose files are missing, from the one file of all: it may be all that was kept."""
    together = read(folder / ALL_NAME)
    if together is None:
        return
    for name in names:
        path, document = folder / f"{name}.json", together["steps"].get(name)
        if document is not None and not path.exists():
            write_json(path, document)


def gather(folder: Path, names: Iterable[str]) -> dict[str, Document]:
    """Writes the one file of all: every step's, and the logs of those that are not done."""
    steps = read_all(folder, names)
    logs: dict[str, str] = {}
    for name, document in steps.items():
        if document["state"] == DONE:
            continue
        for path in (folder / f"{name}.log", *sorted(folder.glob(f"{name}_server_*.log"))):
            if path.exists():
                logs[path.name] = end_of(path)
    together = read(folder / ALL_NAME)
    if together is not None:
        logs = {name: text for name, text in together["logs"].items() if name not in logs} | logs
        logs = {name: text for name, text in logs.items() if _is_wanted(name, steps)}
    write_json(folder / ALL_NAME, {"schema": SCHEMA, "steps": steps, "logs": logs})
    return steps


def _is_wanted(log: str, steps: Mapping[str, Document]) -> bool:
    step = log.removesuffix(".log").split("_server_")[0]
    return step in steps and steps[step]["state"] != DONE


def end_of(path: Path) -> str:
    """The text of a log, or its end if that is long."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES_MAX))
        return file.read().decode(errors="replace")
