"""The registry: direct and lazy targets, and an error that lists what is known."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.core.registry import Registry

LAZY_MODULE = "wave"  # in the standard library, and imported by nothing else here


@pytest.fixture
def unimported() -> Iterator[str]:
    sys.modules.pop(LAZY_MODULE, None)
    yield LAZY_MODULE
    sys.modules.pop(LAZY_MODULE, None)


def test_a_direct_target_is_returned_as_it_is() -> None:
    registry: Registry[list[int]] = Registry("list")
    target = [1]
    registry.register("one", target)
    assert registry.get("one") is target


def test_a_named_target_is_imported_on_first_use_only(unimported: str) -> None:
    registry: Registry[type] = Registry("thing")
    registry.register("lazy", f"{unimported}:Wave_read")
    assert unimported not in sys.modules
    first = registry.get("lazy")
    assert first.__name__ == "Wave_read"
    assert registry.get("lazy") is first


def test_an_unknown_name_lists_the_known_ones() -> None:
    registry: Registry[int] = Registry("eviction policy")
    with pytest.raises(ConfigError, match=r"no eviction policy 'x'; the known ones are: none\."):
        registry.get("x")
    registry.register("b", 2)
    registry.register("a", 1)
    with pytest.raises(ConfigError, match=r"the known ones are: a, b\."):
        registry.get("x")
    assert registry.names() == ["a", "b"]


def test_a_name_is_taken_once() -> None:
    registry: Registry[int] = Registry("number")
    registry.register("one", 1)
    with pytest.raises(ConfigError, match="already"):
        registry.register("one", 2)
    assert registry.get("one") == 1
