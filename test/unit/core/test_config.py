"""Configuration: every field explains itself, and values that cannot work are refused."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

from tiered_kv.core import config
from tiered_kv.core.config import DiskConfig, HostConfig, MemoryConfig, StoreConfig, TieredKVConfig
from tiered_kv.core.errors import ConfigError

CLASSES = [HostConfig, DiskConfig, StoreConfig, MemoryConfig, TieredKVConfig]


def documented_fields(cls: type) -> set[str]:
    """Names of annotated assignments that a string literal follows."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    names = set()
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_doc = (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        )
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_doc:
            names.add(field.target.id)
    return names


def test_every_dataclass_of_the_module_is_checked_here() -> None:
    defined = [
        value
        for value in vars(config).values()
        if dataclasses.is_dataclass(value) and inspect.isclass(value)
    ]
    assert defined == CLASSES


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_a_default_and_a_docstring(cls: type) -> None:
    fields = dataclasses.fields(cls)
    without_default = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    assert without_default == []
    assert documented_fields(cls) == {field.name for field in fields}


@pytest.mark.parametrize("cls", CLASSES)
def test_values_are_frozen(cls: type) -> None:
    value = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(cls)[0].name, None)


DIRECTORY = Path("somewhere")


@pytest.mark.parametrize(
    ("cls", "arguments", "word"),
    [
        (HostConfig, {"size_bytes": 0}, "size"),
        (HostConfig, {"ratio": 0.0}, "ratio"),
        (HostConfig, {"ratio": float("nan")}, "ratio"),
        (DiskConfig, {"directory": DIRECTORY, "size_bytes": -1}, "size"),
        (DiskConfig, {"size_bytes": 1}, "directory"),
        (DiskConfig, {"clear_on_start": True}, "directory"),
        (DiskConfig, {"directory": DIRECTORY, "io_threads": 0}, "threads"),
        (MemoryConfig, {"eviction_policy": ""}, "lru"),
        (MemoryConfig, {"host_enabled": False}, "host"),
        (TieredKVConfig, {"page_size": 0}, "page size"),
        (
            TieredKVConfig,
            {"host": HostConfig(enabled=False), "disk": DiskConfig(directory=DIRECTORY)},
            "host",
        ),
    ],
)
def test_refuses_what_cannot_work(cls: type, arguments: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as error:
        cls(**arguments)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_the_memory_managers_view_follows_the_tiers() -> None:
    assert TieredKVConfig().memory == MemoryConfig(host_enabled=True, disk_enabled=False)
    full = TieredKVConfig(disk=DiskConfig(directory=DIRECTORY), eviction_policy="other")
    assert full.memory == MemoryConfig(eviction_policy="other")
    device_only = TieredKVConfig(host=HostConfig(enabled=False))
    assert device_only.memory == MemoryConfig(host_enabled=False, disk_enabled=False)
