"""The options of how transfers and forward passes share the machine, as a part of `ServerArgs`."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.arg_utils import NS, A, Arg

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.paths import expand_user
from tiered_kv.plugin.options.values import argument

COPY_PATHS = ("auto", "dma", "kernel")
BUDGET_OPTION = "--tiered-kv-write-back-budget"
COPY_OPTION = "--tiered-kv-copy-path"
TRACE_OPTION = "--tiered-kv-trace-file"

#: The budget on a GPU, in percent. docs/overlap.md says why there is none on a CPU.
BUDGET_DEFAULT = 3.0


def write_back_budget(option: str, value: str | float | None) -> str:
    """`auto`, `off`, or a number of percent above 0 and up to 100, as text. Raises ConfigError."""
    if value is False:
        return "off"  # YAML's reading of an unquoted off
    text = "auto" if value is None else str(value).strip().lower().removesuffix("%")
    if text in ("auto", "off"):
        return text
    try:
        percent = float(text)
    except ValueError:
        percent = math.nan
    if not 0 < percent <= 100 or isinstance(value, bool):
        raise ConfigError(
            f"{option} must be a number of percent above 0 and at most 100, auto or off, not "
            f"{value!r}."
        )
    return text


def copy_path(option: str, value: str | None) -> str:
    """One of COPY_PATHS. Raises ConfigError."""
    name = COPY_PATHS[0] if value is None else str(value).strip().lower()
    if name not in COPY_PATHS:
        raise ConfigError(f"{option} must be one of {', '.join(COPY_PATHS)}, not {value!r}.")
    return name


def trace_file(option: str, value: str | os.PathLike[str] | None) -> str | None:
    """An absolute path in a directory that exists, or None for none. Raises ConfigError."""
    if value is None or not str(value).strip():
        return None
    path = expand_user(option, value).absolute()
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{option} cannot be {path}; name a file in a directory that exists and is writable."
        )
    return str(path)


@dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=True)
class OverlapArgs:
    """Mixed into `ServerArgs`, whose options these are."""

    tiered_kv_write_back_budget: A[
        str,
        Arg(
            no_cli=True,
            type_parser=argument(write_back_budget),
            help="By how many percent writing to host and disk may slow down decoding; writing "
            "waits accordingly while requests decode, and is at full speed otherwise. 'off': it "
            f"never waits. Default: auto, which is {BUDGET_DEFAULT:.0f} on GPUs and off with "
            "--device cpu.",
        ),
        NS("memory"),
    ] = "auto"
    tiered_kv_copy_path: A[
        str,
        Arg(
            no_cli=True,
            type_parser=argument(copy_path),
            help="How pages move between a GPU and host memory: 'dma' gathers them into blocks "
            "that the copy engines move, 'kernel' reads and writes host memory directly, 'auto' "
            "(default) measures both at the start, for less than a second.",
        ),
        NS("memory"),
    ] = "auto"
    tiered_kv_trace_file: A[
        str | None,
        Arg(
            no_cli=True,
            help="Write what transfers and forward passes do when to this file, as a Chrome trace "
            "(ui.perfetto.dev); ranks but the first add their number to its name. Up to 64 MB. "
            "Default: off.",
        ),
        NS("memory"),
    ] = None

    def resolve_overlap(self) -> None:
        """Check the options, and replace what the user wrote by what it means."""
        self.tiered_kv_write_back_budget = write_back_budget(
            BUDGET_OPTION, self.tiered_kv_write_back_budget
        )
        self.tiered_kv_copy_path = copy_path(COPY_OPTION, self.tiered_kv_copy_path)
        self.tiered_kv_trace_file = trace_file(TRACE_OPTION, self.tiered_kv_trace_file)


def budget_share(server_args: Any, *, on_cpu: bool) -> float | None:
    """The budget as a share of a decode step's time, or None if writing never waits."""
    value = server_args.tiered_kv_write_back_budget
    if value == "off" or (value == "auto" and on_cpu):
        return None
    return (BUDGET_DEFAULT if value == "auto" else float(value)) / 100


def rank_trace_file(server_args: Any, process: int) -> Path | None:
    """Where the timeline of the server's rank `process` goes, if there is to be one."""
    if server_args.tiered_kv_trace_file is None:
        return None
    path = Path(server_args.tiered_kv_trace_file)
    return path if process == 0 else path.with_name(f"{path.stem}-rank{process}{path.suffix}")
