"""Runs steps, each in a process of its own with a limit, and notes what became of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmark.command_line import ROOT
from benchmark.gpu import record
from benchmark.gpu.plan import Step

#: In the environment of all that a check starts: what outlives its step is known by it.
MARK = "TIERED_KV_GPU_CHECK"
#: How long a step has to stop its servers.
GRACE_S = 6.0


def run_step(step: Step, folder: Path, device: str, limit_s: float, *, is_small: bool) -> str:
    """The state that the step is left in; its output is in OUT/STEP.log."""
    path, log = folder / f"{step.name}.json", folder / f"{step.name}.log"
    path.unlink(missing_ok=True)
    for old in folder.glob(f"{step.name}_server_*.log"):
        old.unlink()
    command = [sys.executable, "-m", "benchmark.gpu.child", step.name, step.function]
    command += [str(folder), device]
    command += ["--small"] if is_small else []
    began_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment(), start_new_session=True
        )
        try:
            is_late = not ended(process, limit_s)
        except BaseException:
            stop(process)
            raise
    kill_marked()
    return close(step, path, process.returncode, time.monotonic() - began_s, is_late=is_late)


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    return {
        # Models are folders: nobody is to look for them, for minutes, where there is no network.
        "HF_HUB_OFFLINE": "1",
        # As in a bundle: else prompts without a prefix take kernels that nobody has built.
        "SGLANG_FLASHINFER_USE_PAGED": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        MARK: str(os.getpid()),
    }


def ended(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Whether it ended by itself."""
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        stop(process)
        return False
    return True


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks it to leave, then makes it."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    kill_marked()


def marked() -> Iterator[int]:
    """Processes that this check has started, and those that they have."""
    mark = f"{MARK}={os.getpid()}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)


def kill_marked() -> None:
    """A server that outlives its step would take the device's memory from the next.

    With their groups: SGLang's processes write their titles where the mark was.
    """
    for number in list(marked()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(number)
            if group != os.getpgrp():
                os.killpg(group, signal.SIGKILL)
            else:
                os.kill(number, signal.SIGKILL)


def close(step: Step, path: Path, code: int, seconds: float, *, is_late: bool) -> str:
    """What the step did not write itself."""
    document = record.read(path) or {}
    if document.get("state") in (record.DONE, record.NOT_HERE) and not is_late:
        return str(document["state"])
    if document.get("state") == record.DONE:
        return record.DONE
    state = record.LATE if is_late else record.FAILED
    why = f"stopped after {seconds:.0f} s" if is_late else f"ended with code {code}"
    more = {"result": document["result"]} if "result" in document else {}
    record.write_json(
        path,
        {
            "schema": record.SCHEMA,
            "step": step.name,
            "device": document.get("device", ""),
            "is_small": document.get("is_small", False),
            "state": state,
            "reason": f"{why}: {last_line(path.with_suffix('.log'))}",
            "seconds": round(seconds, 1),
            **more,
        },
    )
    return state


def last_line(log: Path) -> str:
    lines = [line.strip() for line in record.end_of(log).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
