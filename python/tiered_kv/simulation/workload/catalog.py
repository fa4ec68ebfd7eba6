"""Workloads by name, as a command line writes them.

A trace is "READER:PATH", a generator its name; options follow after commas:
"mooncake:trace.jsonl", "agent_sessions:sessions.jsonl,arrivals=poisson:0.2", "rag,documents=50".
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from fractions import Fraction
from typing import Any

from tiered_kv.core.paths import expand_user
from tiered_kv.simulation.workload.adapt import Adaptation, AdaptedWorkload
from tiered_kv.simulation.workload.arrivals import Arrivals, parse_arrivals
from tiered_kv.simulation.workload.errors import WorkloadError
from tiered_kv.simulation.workload.generators.agents import Agents
from tiered_kv.simulation.workload.generators.best_of_n import BestOfN
from tiered_kv.simulation.workload.generators.chat import Chat
from tiered_kv.simulation.workload.generators.flood import Flood
from tiered_kv.simulation.workload.generators.rag import Rag
from tiered_kv.simulation.workload.generators.shared_context import SharedContext
from tiered_kv.simulation.workload.readers.agent_sessions import read_agent_sessions
from tiered_kv.simulation.workload.readers.chat_log import read_chat_log
from tiered_kv.simulation.workload.readers.length_csv import read_azure, read_burstgpt
from tiered_kv.simulation.workload.readers.mooncake import read_mooncake
from tiered_kv.simulation.workload.request import Workload
from tiered_kv.simulation.workload.slo_mix import parse_slo_mix

GENERATORS: dict[str, type[Any]] = {
    "agents": Agents,
    "best_of_n": BestOfN,
    "chat": Chat,
    "flood": Flood,
    "rag": Rag,
    "shared_context": SharedContext,
}

READERS: dict[str, tuple[Callable[..., Workload], dict[str, type]]] = {
    "agent_sessions": (read_agent_sessions, {"arrivals": Arrivals, "users": int}),
    "azure": (read_azure, {"block_tokens": int}),
    "burstgpt": (read_burstgpt, {"block_tokens": int}),
    "chat_log": (read_chat_log, {"block_tokens": int}),
    "mooncake": (read_mooncake, {"block_tokens": int, "unit": str}),
}

HELP = (
    "a generator, one of "
    + ", ".join(GENERATORS)
    + ", or a trace as READER:PATH with a reader from "
    + ", ".join(READERS)
    + "; options follow after commas: rag,documents=50 or "
    "agent_sessions:PATH,arrivals=poisson:0.2"
)


def open_workload(spec: str, seed: int = 0) -> Workload:
    """The workload that `spec` describes. Raises WorkloadError naming what is known."""
    what, *parts = spec.split(",")
    name, _, path = what.partition(":")
    options = _options(parts, spec)
    if name in READERS:
        return _read(name, path, options, seed)
    if name not in GENERATORS:
        raise WorkloadError(
            f"There is no workload {name!r}; the known ones are "
            f"{', '.join(sorted([*GENERATORS, *READERS]))}."
        )
    if path:
        raise WorkloadError(
            f"{name} is a generator and takes no path; write options as {name},NAME=VALUE."
        )
    kind = GENERATORS[name]
    types = {field.name: type(field.default) for field in fields(kind)}
    _require_known(name, options, frozenset(types))
    values = {key: _converted(key, text, types[key]) for key, text in options.items()}
    workload: Workload = kind(**values).build(seed)
    return workload


def _read(name: str, path: str, options: dict[str, str], seed: int) -> Workload:
    reader, known = READERS[name]
    if not path:
        raise WorkloadError(f"The reader {name} needs a file; write {name}:PATH.")
    _require_known(name, options, frozenset(known))
    values: dict[str, Any] = {
        key: parse_arrivals(text) if key == "arrivals" else _converted(key, text, known[key])
        for key, text in options.items()
    }
    if values.get("block_tokens", 1) < 1:
        raise WorkloadError("A block needs at least 1 token; correct block_tokens.")
    if "arrivals" in known:
        values["seed"] = seed
    return reader(expand_user("a workload's file", path), **values)


def _options(parts: list[str], spec: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise WorkloadError(f"{part!r} in {spec!r} is no option; write NAME=VALUE.")
        options[key.strip()] = value.strip()
    return options


def _require_known(name: str, options: dict[str, str], known: frozenset[str]) -> None:
    for key in options:
        if key not in known:
            raise WorkloadError(
                f"{name} has no option {key!r}; the known ones are {', '.join(sorted(known))}."
            )


def _converted(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise WorkloadError(f"{key} must be {wanted}, not {text!r}.") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and adapt a workload."""
    group = parser.add_argument_group("workload")
    group.add_argument("--workload", required=True, metavar="SPEC", help=HELP)
    group.add_argument("--seed", type=int, default=0, help="for all that is random (default 0)")
    group.add_argument(
        "--rate", type=float, default=1.0, metavar="X", help="arrivals X times as fast"
    )
    group.add_argument(
        "--length",
        type=_fraction,
        default=Fraction(1),
        metavar="X",
        help="all lengths, and the block, times X: 1/16 makes 32-token blocks of 512-token ones",
    )
    group.add_argument(
        "--pause", type=float, default=1.0, metavar="X", help="pauses within sessions times X"
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="only the first N requests, or sessions"
    )
    group.add_argument(
        "--slo-mix",
        metavar="MIX",
        help="service classes by share: interactive:0.3,standard:0.7, or with targets in seconds "
        "as CLASS:SHARE:TTFT:TBT, - for none; a TTFT of 0.5+3x adds three times what the prompt "
        "takes to compute alone",
    )


def from_arguments(arguments: argparse.Namespace) -> Workload:
    """The workload that the options of `add_arguments` ask for. Raises WorkloadError."""
    adaptation = Adaptation(
        rate=arguments.rate,
        length=arguments.length,
        pause=arguments.pause,
        limit=arguments.limit,
        slo_mix=parse_slo_mix(arguments.slo_mix) if arguments.slo_mix else None,
        seed=arguments.seed,
    )
    workload = open_workload(arguments.workload, arguments.seed)
    return workload if adaptation == Adaptation() else AdaptedWorkload(workload, adaptation)


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write 0.0625 or 1/16") from None
