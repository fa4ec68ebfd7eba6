"""A server's own table of classes, out of a mapping (JSON or TOML)."""

from __future__ import annotations

from collections.abc import Mapping

from tiered_kv.api.fields import Fields, TermsError, shortened
from tiered_kv.api.slo import STANDARD, SloClass, SloClasses

NO_CLASS = "none"
"""As the default class: a request that asks for nothing was promised nothing."""

CLASS_NAME_LENGTH_MAX = 64
CLASSES_MAX = 64
_KEYS = ("ttft_ms", "tbt_ms", "max_wait_ms", "task_ms")
_EXAMPLE = '{"chat": {"ttft_ms": 500, "tbt_ms": 50}, "batch": {"ttft_ms": 30000}}'


def parse_classes(table: object) -> tuple[SloClass, ...]:
    """The classes of a mapping from names to `ttft_ms`, `tbt_ms`, `max_wait_ms` and `task_ms`.

    All four are optional. Raises TermsError.
    """
    if not isinstance(table, Mapping) or not table:
        raise TermsError(f"it must map names of classes to objectives, such as {_EXAMPLE}.")
    if len(table) > CLASSES_MAX:
        raise TermsError(f"it has {len(table)} classes, but at most {CLASSES_MAX} are allowed.")
    return tuple(_class(name, value) for name, value in table.items())


def _class(name: object, value: object) -> SloClass:
    if not isinstance(name, str) or not 0 < len(name) <= CLASS_NAME_LENGTH_MAX or name == NO_CLASS:
        raise TermsError(
            f"the name of a class must have 1 to {CLASS_NAME_LENGTH_MAX} characters and not be "
            f"{NO_CLASS!r}: {shortened(name)}."
        )
    if not isinstance(value, Mapping):
        raise TermsError(
            f"the class {name} must be an object with {', '.join(_KEYS)}, not {shortened(value)}."
        )
    fields = Fields(value, lambda key: f"{name}.{key}")
    fields.refuse_unknown(_KEYS)
    return SloClass(name, *(fields.seconds_of_ms(key) for key in _KEYS))


def with_default(classes: tuple[SloClass, ...], default: str | None) -> SloClasses:
    """A server's table; `default` names a class or is "none", and None means "standard".

    Raises TermsError if there is no such class.
    """
    name = STANDARD.name if default is None else default
    if name == NO_CLASS:
        return SloClasses(classes, None)
    table = SloClasses(classes, name)
    if table.find(name) is None:
        known = ", ".join(table.names())
        raise TermsError(
            f"there is no class {shortened(name)}; name one of {known}, or {NO_CLASS}."
        )
    return table
