"""Kernels that servers would compile at their first start: built before, so that no server's time
goes by with it, and it is said where they cannot be.

A bundle brings them (scripts/offline_bundle --build-jit); then this takes seconds. Without nvcc and
without them no server can start, whatever it is asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmark.command_line import ROOT
from benchmark.gpu.record import Record
from benchmark.gpu.setting import Setting

BROUGHT, BUILT, LOADED, MISSING = "brought", "built", "loaded", "missing"

Make = Callable[[], object]


@dataclass(frozen=True)
class Made:
    """One module. failed: why it cannot be had."""

    name: str
    state: str
    seconds: float
    failed: str | None = None


def measure(setting: Setting, notes: Record) -> dict[str, Any]:
    """What became of each module, and seconds. On a CPU nothing is built.

    Raises RuntimeError naming those that cannot be built, and why.
    """
    if not setting.on_gpu:
        # FlashInfer wants to know what for, and asks the GPU otherwise.
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    jit = lists_of_modules()
    found: dict[str, Any] = {"modules": {}, "failed": {}}
    for made in all_made(setting, jit.flashinfer_specs(), jit.sglang_modules()):
        if made.failed is None:
            found["modules"][made.name] = {"state": made.state, "seconds": made.seconds}
        else:
            found["failed"][made.name] = made.failed
        notes.so_far(found)
    if found["failed"]:
        raise RuntimeError(
            "; ".join(f"{name} is not built: {why}" for name, why in found["failed"].items())
        )
    return found


def all_made(
    setting: Setting, flashinfer: Sequence[tuple[str, Make]], sglang: Sequence[tuple[str, Make]]
) -> Iterator[Made]:
    """FlashInfer's by a compiler each, SGLang's one after the other: it compiles by what it has put
    into the environment."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(len(flashinfer)) as each:
        waited_for = [
            each.submit(one_made, name, partial(flashinfer_module, make, builds=setting.on_gpu))
            for name, make in flashinfer
        ]
        for name, load in sglang if setting.on_gpu else ():
            waited_for.append(one.submit(one_made, name, partial(sglang_module, load)))
        for future in as_completed(waited_for):
            yield future.result()


def one_made(name: str, make: Make) -> Made:
    began_s = time.monotonic()
    try:
        state, failed = str(make()), None
    except Exception as error:
        # Whatever a compiler can say: its whole output is in the log.
        print(f"{name}: {error}", flush=True)
        state, failed = MISSING, f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Made(name, state, round(time.monotonic() - began_s, 1), failed)


def lists_of_modules() -> Any:
    """`scripts/lib/bundle/jit_child.py`: a bundle brings the very same ones."""
    path = str(ROOT / "scripts" / "lib")
    if path not in sys.path:
        sys.path.insert(0, path)
    return importlib.import_module("bundle.jit_child")


def flashinfer_module(make_spec: Make, *, builds: bool) -> str:
    spec: Any = make_spec()
    if not builds:
        return BROUGHT if spec.is_aot else MISSING
    state = BROUGHT if spec.is_aot else BUILT
    # What was built on another machine need not load on this one.
    spec.build_and_load()
    return state


def sglang_module(load: Make) -> str:
    """SGLang says nowhere whether it had to compile: seconds do."""
    load()
    return LOADED
