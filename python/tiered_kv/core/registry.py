"""A registry that imports what it names only when it is asked for."""

from __future__ import annotations

import importlib
from typing import Generic, TypeVar, cast

from tiered_kv.core.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects of one kind, given directly or as "package.module:attribute"."""

    def __init__(self, kind: str) -> None:
        """`kind` names in error messages what is registered, for example "eviction policy"."""
        self._kind = kind
        self._targets: dict[str, T | str] = {}

    def register(self, name: str, target: T | str) -> None:
        """Add `target` under `name`, which must be free; a str is imported on first use."""
        if name in self._targets:
            raise ConfigError(f"The {self._kind} {name!r} is already registered; use another name.")
        self._targets[name] = target

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._targets)

    def get(self, name: str) -> T:
        """The object registered as `name`. Raises ConfigError listing the known names."""
        try:
            target = self._targets[name]
        except KeyError:
            known = ", ".join(self.names()) or "none"
            raise ConfigError(
                f"There is no {self._kind} {name!r}; the known ones are: {known}."
            ) from None
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            target = cast(T, getattr(importlib.import_module(module), attribute))
            self._targets[name] = target
        return target
