"""`--tiered-kv-cascade`: its values, and what it does not go with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.core.errors import ConfigError
from tiered_kv.plugin import cascade_option


def server_args(mode: str, **fields: Any) -> Any:
    device = fields.get("device", "cpu")
    backend = fields.pop("backend", cascade_option.BACKENDS.get(device))
    values = {
        "tiered_kv": True,
        "tiered_kv_cascade": mode,
        "model_path": "model",
        "device": "cpu",
        "enable_deterministic_inference": False,
        "enable_torch_compile": False,
        "get_attention_backends": lambda: (backend, backend),
    }
    return SimpleNamespace(**values | fields)


@pytest.mark.parametrize(
    ("value", "mode"),
    [(None, "auto"), (True, "on"), (False, "off"), (" ON ", "on"), ("auto", "auto")],
)
def test_values(value: Any, mode: str) -> None:
    assert cascade_option.cascade_mode(value) == mode


def test_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of auto, on, off, not 'maybe'"):
        cascade_option.cascade_mode("maybe")


@pytest.mark.parametrize(
    ("mode", "device", "wanted"),
    [
        ("auto", "cpu", True),
        ("auto", "cuda", False),
        ("on", "cuda", True),
        ("off", "cpu", False),
    ],
)
def test_auto_is_where_it_was_measured(mode: str, device: str, wanted: bool) -> None:
    args = server_args(mode, device=device)
    assert cascade_option.is_wanted(args) is wanted
    cascade_option.check_resolved(args)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device": "cuda", "backend": "fa3"}, "backend fa3, only with flashinfer"),
        ({"backend": "intel_amx"}, "backend intel_amx, only with torch_native"),
        ({"enable_deterministic_inference": True}, "--enable-deterministic-inference"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
    ],
)
def test_what_it_does_not_go_with(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        cascade_option.check_resolved(server_args("on", **fields))
    for mode in ("auto", "on"):
        assert not cascade_option.is_wanted(server_args(mode, **fields))
    cascade_option.check_resolved(server_args("auto", **fields))


def test_nothing_without_the_flag() -> None:
    assert not cascade_option.is_wanted(server_args("on", tiered_kv=False))
    assert not cascade_option.is_wanted(None)
