"""Checks that the installed SGLang has all that the table of its release says."""

from __future__ import annotations

import dataclasses
import dis
import functools
import importlib
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from tiered_kv.core.errors import UpstreamError
from tiered_kv.plugin.upstream.current import symbols
from tiered_kv.plugin.upstream.installed import ADVICE, installed, verify_version
from tiered_kv.plugin.upstream.symbol import Symbol


def verify() -> None:
    """Raise UpstreamError unless the release is supported and every symbol has the known shape.

    Imports all modules concerned: seconds, unless SGLang has loaded them anyway.
    """
    verify_version()
    for symbol in symbols.SYMBOLS:
        difference = difference_of(symbol)
        if difference is not None:
            raise UpstreamError(
                f"--tiered-kv cannot run on this SGLang {installed()} because {symbol.name} "
                f"{difference}; {ADVICE}"
            )


def difference_of(symbol: Symbol) -> str | None:
    """How the installed `symbol` differs from the table ("is missing"), or None if it doesn't."""
    try:
        found = resolve(symbol.name)
    except (ImportError, AttributeError) as error:
        return f"is missing ({error})"
    if symbol.parameters is not None:
        parameters = tuple(inspect.signature(found).parameters)
        if parameters != symbol.parameters:
            return f"takes ({', '.join(parameters)}), not ({', '.join(symbol.parameters)})"
    for attribute in symbol.attributes:
        if not _has_attribute(found, attribute):
            return f"has no attribute {attribute}"
    return None


def resolve(name: str) -> Any:
    """The object that `name` means in SGLang itself, beneath the classes we put in its place.

    Raises ImportError or AttributeError.
    """
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for part in rest:
        if inspect.ismodule(found) and not hasattr(found, part):
            found = importlib.import_module(f"{found.__name__}.{part}")
            continue
        found = getattr(found, part)
        if isinstance(found, type):
            found = next(c for c in found.__mro__ if not c.__module__.startswith("tiered_kv."))
    return found


def _has_attribute(owner: Any, name: str) -> bool:
    if hasattr(owner, name):
        return True
    if dataclasses.is_dataclass(owner) and any(f.name == name for f in dataclasses.fields(owner)):
        return True
    return isinstance(owner, type) and any(name in _set_on_self(c) for c in owner.__mro__)


@functools.cache
def _set_on_self(owner: type) -> frozenset[str]:
    """Names of the attributes that the methods of `owner` assign."""
    names: set[str] = set()
    for value in vars(owner).values():
        code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
        if code is not None:
            names.update(_stored_attributes(code))
    return frozenset(names)


def _stored_attributes(code: CodeType) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
