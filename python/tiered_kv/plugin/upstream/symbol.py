"""One row of the tables of what the plugin uses of SGLang, and short ways of writing many."""

from __future__ import annotations

import dataclasses

SRT = "sglang.srt"
MEM = "sglang.srt.mem_cache"


@dataclasses.dataclass(frozen=True, slots=True)
class Symbol:
    """One name of SGLang's that we import, call, override or read."""

    name: str
    """Dotted name; the longest importable part is the module."""
    users: tuple[str, ...]
    """Modules of `tiered_kv.plugin` that need it."""
    parameters: tuple[str, ...] | None = None
    """Of a function: the exact names of its parameters. None: not checked."""
    attributes: tuple[str, ...] = ()
    """Of a class: names it defines, declares as fields, or that a method sets on `self`."""


def function(dotted_name: str, parameters: str, users: str) -> Symbol:
    """A function with exactly these parameters; both lists are separated by blanks."""
    return Symbol(dotted_name, tuple(users.split()), tuple(parameters.split()))


def object_(dotted_name: str, attributes: str, users: str) -> Symbol:
    """Any object that has these attributes; both lists are separated by blanks."""
    return Symbol(dotted_name, tuple(users.split()), attributes=tuple(attributes.split()))


def methods(owner: str, users: str, **parameters: str) -> tuple[Symbol, ...]:
    """Methods of one class by name, each with its parameters after `self`."""
    return tuple(
        function(f"{owner}.{method}", f"self {text}", users) for method, text in parameters.items()
    )
